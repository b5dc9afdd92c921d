"""The one owner of commands: chunks and joint states in, one command a control period out.

Owns: `Executor`, the reasons it gives, and the order in which it judges. Must not import ROS, the
policy or an engine. No threads, no clocks, no input or output: every method is told the time, so a
run can be computed again from its inputs.

Two clocks are told. `now_ns` is ROS time, in which chunks are stamped; it may jump, stand still or
be simulated. `steady_ns` never jumps; watchdogs and limits live on it.

What a hold is: position commands slow down as fast as their acceleration limit allows and then
stay at the last command, velocity commands go to zero. A measured pose is never commanded to hold
one, since an arm that sags under its own weight would sink a little at every hold. A hold goes on
commanding, so no controller runs out of commands and drops its torque.

The order of judgement in `step`: emergency stop, disabled, joint states, then channel by channel
the chunk's watchdog, its rows and the first-command guard. What was judged is in `Command`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from groot_int8_ros.control.chunks import NOT_FINITE, Refusal, Rows, TimedChunk, shape_fault
from groot_int8_ros.control.command import ChannelCommand, Command, Counters, Mode
from groot_int8_ros.control.commitment import Commitment
from groot_int8_ros.control.latency import LatencyEstimate
from groot_int8_ros.control.limits import Motion, brake, follow, follow_velocity
from groot_int8_ros.control.seams import Plan
from groot_int8_ros.control.settings import Channel, ExecutorSettings
from groot_int8_ros.control.tracking import Tracking
from groot_int8_ros.control.types import NANOSECONDS, Float64Array, Int64Array, plausible
from groot_int8_ros.control.watchdog import Watchdog

# Why chunks and joint states are not taken.
NO_JOINTS = "joints missing"
AHEAD = "stamp in the future"
TOO_OLD = "too old"
REPEATED = "repeated or reordered"
UNSTAMPED = "no stamp"
OUTSIDE = "outside the statistics"
# Why a channel holds.
ESTOP = "emergency stop"
DISABLED = "disabled"
NO_STATE = "no joint state"
STALE_STATE = "joint state is stale"
WAITING = "no chunk yet"
STALLED = "chunks have stalled"
UNDERRUN = "no rows left"
FAR = "first command is far"
OTHER = "another channel holds"

# Difference between the two clocks' progress that counts as a jump of ROS time.
_JUMP_S = 0.5
# A step that comes this many periods after the last one has missed its deadline.
_LATE_PERIODS = 1.5


class _ChannelState:
    """One channel's part of the executor's state."""

    def __init__(self, channel: Channel, settings: ExecutorSettings) -> None:
        self.channel = channel
        self.plan = Plan(settings.seam)
        self.watchdog = Watchdog(settings.chunk_timeout_s)
        self.motion: Motion | None = None
        self.guarded = True
        self.hold: Refusal | None = None
        self.tracking = Tracking()
        self.astray: tuple[str, ...] = ()


class Executor:
    """Turns chunks into commands; see the module.

    Args:
        settings: How.
    """

    def __init__(self, settings: ExecutorSettings) -> None:
        self.settings = settings
        self.counters = Counters()
        self.latency = LatencyEstimate(settings.latency)
        self._channels = [_ChannelState(channel, settings) for channel in settings.channels]
        self._state_joints = tuple(
            joint
            for channel in settings.channels
            if channel.interface == "position"
            for joint in channel.joints
        )
        self._place = {joint: index for index, joint in enumerate(self._state_joints)}
        joints = len(self._state_joints)
        self._measured = np.full(joints, np.nan)
        self._measured_stamp_ns: Int64Array = np.zeros(joints, np.int64)
        self._state_watchdogs = [
            Watchdog(settings.joint_state_timeout_s) for _ in self._state_joints
        ]
        self._state_fault: Refusal | None = None
        self._chunk_fault: Refusal | None = None
        self._newest_stamp_ns: int | None = None
        self._commanding = False
        self._enabled = False
        self._estop: str | None = None
        self._rests = 0
        self._last_now_ns: int | None = None
        self._last_steady_ns: int | None = None
        self._plans_cleared: str | None = None

    def tighten(self, changes: Mapping[str, Any]) -> None:
        """Take other values of some settings, from the next step on.

        Args:
            changes: Names of `ExecutorSettings` to values. Only such as make the executor hold
                sooner or ramp more slowly: what is commanded never jumps by them.

        Raises:
            ConfigurationError: A value lies outside its range; nothing was changed.
        """
        self.settings = settings = replace(self.settings, **changes)
        for state in self._channels:
            state.watchdog.timeout_s = settings.chunk_timeout_s
        for watchdog in self._state_watchdogs:
            watchdog.timeout_s = settings.joint_state_timeout_s

    @property
    def enabled(self) -> bool:
        """Whether chunks are executed."""
        return self._enabled

    @property
    def commanding(self) -> bool:
        """Whether `step` gives commands: enabled, or not yet at rest since."""
        return self._commanding

    @property
    def estop_reason(self) -> str | None:
        """Why the emergency stop is latched, or None."""
        return self._estop

    @property
    def chunk_fault(self) -> Refusal | None:
        """Why the newest chunk was refused, or None."""
        return self._chunk_fault

    @property
    def state_joints(self) -> tuple[str, ...]:
        """Joints whose state is needed: those with position commands."""
        return self._state_joints

    def state_hold(self, steady_ns: int) -> Refusal | None:
        """Return why the joint states make every channel hold, if so."""
        return self._joint_state_hold(steady_ns)

    def chunk_silence_s(self, channel: str, steady_ns: int) -> float | None:
        """Return the seconds since a channel's newest chunk, or None before the first."""
        state = next(state for state in self._channels if state.channel.name == channel)
        return state.watchdog.silence_s(steady_ns)

    def on_joint_state(
        self,
        names: Sequence[str],
        positions: Sequence[float],
        stamp_ns: int,
        now_ns: int,
        steady_ns: int,
    ) -> Refusal | None:
        """Take measured positions.

        Args:
            names: Joints, in any order; those that no channel has are ignored, and a message may
                hold some of the channels' joints only.
            positions: One for each name, in the units of the commands.
            stamp_ns: The message's stamp.
            now_ns: ROS time.
            steady_ns: Steady time.

        Returns:
            Why they were not taken, or None.
        """
        refusal = self._take_joint_state(names, positions, stamp_ns, now_ns, steady_ns)
        self._state_fault = None
        if refusal:
            self.refuse_joint_state(refusal)
        return refusal

    def refuse_joint_state(self, refusal: Refusal) -> None:
        """Count measured positions that could not even be read, and why."""
        self._state_fault = refusal
        self.counters.refusals[f"joint state: {refusal.reason}"] += 1

    def on_chunk(self, chunk: TimedChunk, now_ns: int, steady_ns: int) -> Refusal | None:
        """Take a chunk, each channel its own joints.

        Args:
            chunk: As it arrived.
            now_ns: ROS time.
            steady_ns: Steady time.

        Returns:
            Why none of it was taken, or None. A channel that finds only some of its joints takes
            nothing, and its watchdog goes on.
        """
        refusal = self._chunk_refusal(chunk, now_ns) or self._take_chunk(chunk, now_ns, steady_ns)
        self._chunk_fault = refusal
        if refusal:
            self.counters.refusals[f"chunk: {refusal.reason}"] += 1
        return refusal

    def enable(self, now_ns: int, steady_ns: int) -> Refusal | None:
        """Begin to command: a hold at first, then the chunks that arrive from now on.

        Args:
            now_ns: ROS time.
            steady_ns: Steady time.

        Returns:
            Why it was refused, or None.
        """
        del now_ns  # joint states are judged on the steady clock
        refusal = self._enable_refusal(steady_ns)
        if refusal:
            self.counters.refusals[f"enable: {refusal.reason}"] += 1
            return refusal
        if self._enabled:
            return None
        if not self._commanding:
            for state in self._channels:
                state.motion = Motion.at_rest(self._start(state))
                state.tracking.clear()
        self._clear_plans(None)
        self._enabled = self._commanding = True
        self._rests = 0
        return None

    def disable(self) -> None:
        """Come to rest, hold for some commands, then command no more."""
        self._enabled = False
        self._rests = 0

    def end(self) -> Command:
        """Command no more from now on, even where an emergency stop is latched.

        For the end of a process or an activation, after `disable` and enough steps to rest.
        Whoever enables again begins where the robot stands then.

        Returns:
            The hold to leave behind: positions at the last command, velocities zero. Where the
            robot was not at rest yet, it is a stop at once.
        """
        self._enabled = self._commanding = False
        self._clear_plans(None)
        channels = []
        for state in self._channels:
            if state.motion is None:
                continue
            channel, zeros = state.channel, np.zeros(len(state.channel.joints))
            values = zeros if channel.interface == "velocity" else state.motion.position
            state.motion = Motion.at_rest(values)
            hold = Refusal(DISABLED, "commands have ended")
            channels.append(ChannelCommand(channel.name, values, zeros, hold, False, True, zeros))
        return Command("stopping", tuple(channels))

    def estop(self, reason: str) -> None:
        """Hold until `reset_estop`, whatever else happens; the first reason is kept."""
        if self._estop is None:
            self._estop = reason
            self.counters.estops += 1
        self._enabled = False
        self._rests = 0

    def reset_estop(self) -> None:
        """Release the emergency stop. The executor is disabled then."""
        self._estop = None
        self._rests = 0

    def on_clock_jump(self) -> None:
        """Forget everything that was stamped before a jump of ROS time."""
        self.counters.clock_jumps += 1
        self._clear_plans("ROS time jumped")
        self._newest_stamp_ns = None
        self._measured_stamp_ns[:] = 0
        self._last_now_ns = None

    def step(self, now_ns: int, steady_ns: int) -> Command:
        """Return the command for now. To be called once a control period.

        Args:
            now_ns: ROS time.
            steady_ns: Steady time.

        Returns:
            The command. Values keep every limit of their channel, whatever was put in.
        """
        dt_s = self._advance(now_ns, steady_ns)
        if not self._commanding:
            return Command("off")
        stop = self._stop(steady_ns)
        holds = [stop or self._hold(state, now_ns, steady_ns) for state in self._channels]
        first = next(
            (
                (state.channel.name, hold)
                for state, hold in zip(self._channels, holds, strict=True)
                if hold
            ),
            None,
        )
        if first and self.settings.hold_together:
            other = Refusal(OTHER, f"channel '{first[0]}' holds: {first[1].message}")
            holds = [hold or other for hold in holds]
        channels = tuple(
            self._move(state, hold, now_ns, steady_ns, dt_s)
            for state, hold in zip(self._channels, holds, strict=True)
        )
        command = Command(self._mode(channels), channels)
        self._count_rests(command)
        return command

    def commitment(
        self, now_ns: int, *, history_s: float = 1.0, margin_s: float = 0.0
    ) -> Commitment | None:
        """Return what will be executed until the next chunk is expected, for seam `rtc`.

        Args:
            now_ns: ROS time.
            history_s: How much of the past to include.
            margin_s: How long the policy may begin after now.

        Returns:
            The commitment, in the joints of all channels; None while nothing is executed or the
            policy's latency is not known.
        """
        expected_s = self.latency.expected_s()
        newest = self._channels[0].plan.newest
        executing = self._enabled and not any(state.hold for state in self._channels)
        if expected_s is None or newest is None or not executing:
            return None
        ahead_s = expected_s + margin_s + self.settings.control_period_s
        until_ns = now_ns + round(ahead_s * NANOSECONDS)
        # Rows closer together than commands would say nothing more.
        period_ns = max(
            (newest.last_ns - newest.first_ns) // max(len(newest.due_ns) - 1, 1),
            round(self.settings.control_period_s * NANOSECONDS),
        )
        span_ns = until_ns - now_ns + round(history_s * NANOSECONDS)
        count = -(-span_ns // period_ns)
        due_ns = until_ns - period_ns * np.arange(count, -1, -1, dtype=np.int64)
        rows = []
        for due in due_ns.tolist():
            parts = [state.plan.at(due) for state in self._channels]
            found = [part for part in parts if part is not None]
            # The chunk ends before the next one is expected: there is less to commit to.
            if len(found) < len(parts):
                break
            rows.append(np.concatenate(found))
        if not rows or int(due_ns[len(rows) - 1]) < now_ns:
            return None
        return Commitment(
            made_ns=now_ns,
            joint_names=tuple(j for state in self._channels for j in state.channel.joints),
            due_ns=due_ns[: len(rows)],
            targets=np.stack(rows),
        )

    def _take_joint_state(
        self,
        names: Sequence[str],
        positions: Sequence[float],
        stamp_ns: int,
        now_ns: int,
        steady_ns: int,
    ) -> Refusal | None:
        if len(set(names)) != len(names) or len(positions) != len(names):
            return Refusal(
                NO_JOINTS,
                f"a joint state has {len(names)} names, {len(set(names))} of them different, and "
                f"{len(positions)} positions",
            )
        found = [
            (self._place[name], position)
            for name, position in zip(names, positions, strict=True)
            if name in self._place
        ]
        if not found:
            return Refusal(NO_JOINTS, "a joint state has none of the joints that are commanded")
        places = np.array([place for place, _ in found])
        values = np.array([position for _, position in found], np.float64)
        good = plausible(values)
        if not good.all():
            bad = [self._state_joints[place] for place in places[~good]]
            return Refusal(
                NOT_FINITE, f"the measured position of {', '.join(bad)} is not a finite number"
            )
        refusal = self._stamp_refusal(
            "joint state", stamp_ns, now_ns, self.settings.joint_state_timeout_s
        )
        if refusal:
            return refusal
        if stamp_ns <= int(self._measured_stamp_ns[places].max()):
            return Refusal(REPEATED, "a joint state is not newer than the one before it")
        self._measured[places] = values
        self._measured_stamp_ns[places] = stamp_ns
        for place in places:
            self._state_watchdogs[place].feed(steady_ns)
        return None

    def _stamp_refusal(
        self, what: str, stamp_ns: int, now_ns: int, max_age_s: float
    ) -> Refusal | None:
        if stamp_ns <= 0:
            return Refusal(UNSTAMPED, f"a {what} has no stamp in its header")
        age_s = (now_ns - stamp_ns) / NANOSECONDS
        if age_s < -self.settings.max_chunk_ahead_s:
            return Refusal(
                AHEAD,
                f"a {what} is stamped {-age_s:.3f} s in the future: use_sim_time may be set "
                "wrongly, or the machines' clocks differ",
            )
        if age_s > max_age_s:
            return Refusal(
                TOO_OLD, f"a {what} is {age_s:.3f} s old on arrival, more than {max_age_s:g} s"
            )
        return None

    def _chunk_refusal(self, chunk: TimedChunk, now_ns: int) -> Refusal | None:
        refusal = shape_fault(chunk) or self._stamp_refusal(
            "chunk", chunk.stamp_ns, now_ns, self.settings.max_chunk_age_s
        )
        if refusal:
            return refusal
        if self._newest_stamp_ns is not None and chunk.stamp_ns <= self._newest_stamp_ns:
            return Refusal(REPEATED, "a chunk's observation is not newer than the one before it")
        if int(chunk.due_ns[-1]) < now_ns:
            return Refusal(
                TOO_OLD,
                "every row of a chunk was due before its arrival: the policy takes longer than a "
                "chunk lasts",
            )
        return None

    def _take_chunk(self, chunk: TimedChunk, now_ns: int, steady_ns: int) -> Refusal | None:
        place = {name: index for index, name in enumerate(chunk.joint_names)}
        taking: list[tuple[_ChannelState, Rows]] = []
        missing: list[str] = []
        for state in self._channels:
            channel = state.channel
            lacking = [joint for joint in channel.joints if joint not in place]
            if lacking:
                missing += lacking
                continue
            values = chunk.targets[:, [place[joint] for joint in channel.joints]]
            if channel.statistics is not None and self.settings.on_outside == "refuse":
                wrong = channel.statistics.outside(values)
                if wrong.any():
                    bad = [joint for joint, out in zip(channel.joints, wrong, strict=True) if out]
                    return Refusal(
                        OUTSIDE,
                        f"the chunk's targets of {', '.join(bad)} lie outside the statistics of "
                        "the training set",
                    )
            taking.append((state, Rows(chunk.due_ns, values)))
        if not taking:
            return Refusal(NO_JOINTS, f"the chunk lacks {', '.join(missing)}")
        if missing:
            self.counters.refusals[f"chunk: {NO_JOINTS}"] += 1
        if all(state.watchdog.expired(steady_ns) for state in self._channels):
            self.latency.restart()
        self.latency.add((now_ns - chunk.stamp_ns) / NANOSECONDS)
        self._newest_stamp_ns = chunk.stamp_ns
        self._plans_cleared = None
        self._join(taking, now_ns, steady_ns)
        return None

    def _join(
        self, taking: Sequence[tuple[_ChannelState, Rows]], now_ns: int, steady_ns: int
    ) -> None:
        """Let a chunk's columns follow in the channels that take them."""
        counters, seam = self.counters, self.settings.seam
        seam_ns = self._seam_ns(now_ns)
        counters.chunks += 1
        counters.rows_skipped_last = taking[0][1].past_rows(now_ns)
        counters.rows_skipped += counters.rows_skipped_last
        counters.late_chunks += int(
            any(
                state.plan.newest is not None and state.plan.at(seam_ns) is None
                for state, _ in taking
            )
        )
        counters.seam_jump_last = max(state.plan.add(rows, seam_ns) for state, rows in taking)
        counters.seam_jump_max = max(counters.seam_jump_max, counters.seam_jump_last)
        if seam.kind == "rtc" and counters.seam_jump_last > seam.rtc_tolerance:
            counters.prefix_mismatches += 1
        for state, _ in taking:
            state.watchdog.feed(steady_ns)

    def _enable_refusal(self, steady_ns: int) -> Refusal | None:
        if self._estop is not None:
            return Refusal(ESTOP, f"the emergency stop is latched: {self._estop}; reset it first")
        fault = self._joint_state_hold(steady_ns)
        if fault:
            return fault
        if self._commanding:
            return None
        for state in self._channels:
            channel = state.channel
            if channel.interface == "velocity":
                continue
            measured = self._measured_of(channel)
            inside = np.clip(measured, channel.limits.lower, channel.limits.upper)
            wrong = np.abs(measured - inside) > channel.start_tolerance
            if wrong.any():
                index = int(np.flatnonzero(wrong)[0])
                return Refusal(
                    OUTSIDE,
                    f"{channel.joints[index]} stands at {measured[index]:.4g}, outside its limits "
                    f"{channel.limits.lower[index]:.4g} to {channel.limits.upper[index]:.4g}: "
                    "move it inside by hand, or correct the limits",
                )
        return None

    def _start(self, state: _ChannelState) -> Float64Array:
        """Return where a channel's commands begin."""
        channel = state.channel
        if channel.interface == "velocity":
            return np.zeros(len(channel.joints))
        start = self._measured_of(channel)
        if state.motion is not None:
            # The arm still stands where it was told to: starting from where gravity has pulled it
            # would let it sink at every enabling.
            last = state.motion.position
            start = np.where(np.abs(last - start) <= channel.start_tolerance, last, start)
        return np.clip(start, channel.limits.lower, channel.limits.upper)

    def _measured_of(self, channel: Channel) -> Float64Array:
        return self._measured[[self._place[joint] for joint in channel.joints]]

    def _clear_plans(self, because: str | None) -> None:
        for state in self._channels:
            state.plan.clear()
            state.watchdog.reset()
            state.guarded = True
        self._plans_cleared = because

    def _seam_ns(self, now_ns: int) -> int:
        return now_ns + round(self.settings.lead_s * NANOSECONDS)

    def _advance(self, now_ns: int, steady_ns: int) -> float:
        """Note the time and return the seconds since the last step, at most a period."""
        period_s = self.settings.control_period_s
        self.counters.steps += 1
        last_now_ns, last_steady_ns = self._last_now_ns, self._last_steady_ns
        elapsed_s = period_s
        if last_steady_ns is not None:
            elapsed_s = (steady_ns - last_steady_ns) / NANOSECONDS
            if self._commanding and elapsed_s > _LATE_PERIODS * period_s:
                self.counters.deadline_misses += 1
        if last_now_ns is not None:
            passed_s = (now_ns - last_now_ns) / NANOSECONDS
            if passed_s < -_JUMP_S or passed_s > max(elapsed_s, 0.0) + _JUMP_S:
                self.on_clock_jump()
        self._last_now_ns, self._last_steady_ns = now_ns, steady_ns
        return min(elapsed_s, period_s)

    def _stop(self, steady_ns: int) -> Refusal | None:
        """Return why nothing is executed, if so."""
        if self._estop is not None:
            return Refusal(ESTOP, self._estop)
        if not self._enabled:
            return Refusal(DISABLED, "commands are disabled")
        return self._joint_state_hold(steady_ns)

    def _joint_state_hold(self, steady_ns: int) -> Refusal | None:
        because = f": {self._state_fault.message}" if self._state_fault else ""
        silent = [
            (joint, watchdog)
            for joint, watchdog in zip(self._state_joints, self._state_watchdogs, strict=True)
            if watchdog.expired(steady_ns)
        ]
        if silent:
            names = ", ".join(joint for joint, _ in silent)
            if any(watchdog.silence_s(steady_ns) is None for _, watchdog in silent):
                return Refusal(NO_STATE, f"no state of {names} has come{because}")
            return Refusal(
                STALE_STATE,
                f"no state of {names} for more than {self.settings.joint_state_timeout_s:g} s"
                f"{because}",
            )
        if self.settings.on_outside_state == "refuse":
            for state in self._channels:
                channel = state.channel
                if channel.interface == "velocity" or channel.statistics is None:
                    continue
                wrong = channel.statistics.outside(self._measured_of(channel))
                if wrong.any():
                    bad = [joint for joint, out in zip(channel.joints, wrong, strict=True) if out]
                    return Refusal(
                        OUTSIDE,
                        f"the measured {', '.join(bad)} lie outside the statistics of the "
                        "training set; the policy has never seen such a pose",
                    )
        return None

    def _hold(self, state: _ChannelState, now_ns: int, steady_ns: int) -> Refusal | None:
        """Return why one channel has nothing to execute, if so."""
        if state.plan.newest is None:
            because = f": {self._plans_cleared}" if self._plans_cleared else ""
            fault = f"; the newest was refused: {f.message}" if (f := self._chunk_fault) else ""
            return Refusal(WAITING, f"no chunk has come yet{because}{fault}")
        if state.watchdog.expired(steady_ns):
            return Refusal(
                STALLED,
                f"no chunk for more than {self.settings.chunk_timeout_s:g} s: the policy has "
                "stopped, hangs, or its chunks are refused",
            )
        target = state.plan.at(self._seam_ns(now_ns))
        if target is None:
            return Refusal(UNDERRUN, "the newest chunk is over and no other has come")
        channel = state.channel
        if channel.interface == "velocity":
            return None
        if state.guarded:
            far = np.abs(target - self._measured_of(channel)) > channel.guard_distance
            state.guarded = bool(far.any())
            if state.guarded and self.settings.first_command == "refuse":
                index = int(np.flatnonzero(far)[0])
                return Refusal(
                    FAR,
                    f"the first target of {channel.joints[index]} is {target[index]:.4g}, more "
                    f"than {channel.guard_distance[index]:g} from where the joint stands",
                )
        return None

    def _move(
        self,
        state: _ChannelState,
        hold: Refusal | None,
        now_ns: int,
        steady_ns: int,
        dt_s: float,
    ) -> ChannelCommand:
        """Move one channel's command one step on."""
        channel, period_s = state.channel, self.settings.control_period_s
        motion = state.motion
        assert motion is not None
        if hold and (state.hold is None or state.hold.reason != hold.reason):
            self.counters.holds[f"{channel.name}: {hold.reason}"] += 1
            self.counters.underruns += int(hold.reason == UNDERRUN)
        state.hold = hold
        seam_ns = self._seam_ns(now_ns)
        target = None if hold else state.plan.at(seam_ns)
        ramping, clamped = False, None
        if target is None:
            state.guarded = True
            if channel.interface == "velocity":
                zeros = np.zeros(len(channel.joints))
                motion, _ = follow_velocity(channel.limits, period_s, motion, zeros, dt_s)
            else:
                motion = brake(channel.limits, period_s, motion, dt_s)
        elif channel.interface == "velocity":
            motion, clamped = follow_velocity(channel.limits, period_s, motion, target, dt_s)
        else:
            ramping = state.guarded
            step_s = max(dt_s, 1e-9)
            before = state.plan.before(seam_ns, step_s)
            moving = np.zeros(len(target)) if before is None else (target - before) / step_s
            fraction = self.settings.ramp_fraction if ramping else 1.0
            motion, clamped = follow(
                channel.limits, period_s, motion, target, moving, dt_s, fraction
            )
        # A ramp keeps every joint from its target, on purpose.
        if clamped is not None and not ramping:
            for name in ("position", "velocity", "acceleration"):
                if getattr(clamped, name).any():
                    self.counters.clamps[f"{channel.name}: {name}"] += 1
        state.motion = motion
        resting = hold is not None and motion.resting
        if channel.interface == "velocity":
            resting = resting and not motion.position.any()
        return ChannelCommand(
            channel.name,
            motion.position,
            motion.velocity,
            hold,
            ramping,
            resting,
            self._track(state, motion.position, steady_ns),
            state.astray,
        )

    def _track(
        self, state: _ChannelState, commanded: Float64Array, steady_ns: int
    ) -> Float64Array:
        """Return how far a channel's joints are from where they were told to be."""
        channel = state.channel
        if channel.interface == "velocity":
            return np.zeros(len(channel.joints))
        state.tracking.add(commanded, steady_ns)
        error = state.tracking.error(self._measured_of(channel), steady_ns)
        if channel.tracking_tolerance is not None:
            before = state.astray
            state.astray = tuple(
                joint
                for joint, far in zip(
                    channel.joints, error > channel.tracking_tolerance, strict=True
                )
                if far
            )
            for joint in state.astray:
                self.counters.astray[f"{channel.name}: {joint}"] += int(joint not in before)
        return error

    def _mode(self, channels: tuple[ChannelCommand, ...]) -> Mode:
        if self._estop is not None:
            return "estop"
        if not self._enabled:
            return "stopping"
        if any(channel.hold for channel in channels):
            return "holding"
        return "ramping" if any(channel.ramping for channel in channels) else "running"

    def _count_rests(self, command: Command) -> None:
        """End commanding once a stop has come to rest and was said often enough."""
        if self._enabled or not command.resting:
            self._rests = 0
            return
        self._rests += 1
        if self._estop is None and self._rests >= self.settings.final_holds:
            self.end()
