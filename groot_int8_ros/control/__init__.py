"""Chunk timing, seams, limits, gates, watchdogs and holds: what turns chunks into commands.

ROS-free and policy-free: pure functions of time and arrays, and one class, `Executor`, that holds
all state there is. Must not import ROS, the policy or an engine: the process that owns the
commands must not share a fate with the one that runs the network.
"""
