"""Closed loop: a policy that does its task on the simulated robot, stepped, and how well."""
