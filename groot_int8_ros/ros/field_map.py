"""Numbers in the fields of any message, named by paths such as `motor_state[3].q`.

Owns: the paths' grammar, their check against a message class, and reading and writing the fields
as arrays. Must not import rclpy or any message package by itself: a class is imported by the name
that the user gives, and only from a package's `msg`. Nothing is evaluated.

A path is names joined by dots, each with an index in brackets where the field is an array or a
sequence: `motor_state[3].q`, `position[0]`, `pose.position.x`. It ends at a number. Everything
that can be known beforehand is checked at configure: names, what may be indexed, the size of fixed
arrays and the limit of bounded sequences, and that the end is a number. How long a sequence is can
only be seen in a message.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groot_int8_ros.errors import ConfigurationError, ObservationError
from groot_int8_ros.policy.robot import joint_to_policy
from groot_int8_ros.policy.types import Float32Array, Float64Array, JointSpec

_TYPE_NAME = re.compile(r"([a-z]\w*)(?:/msg)?/([A-Z]\w*)", re.ASCII)
_STEP = re.compile(r"([a-z]\w*)(?:\[(\d{1,6})\])?", re.ASCII)
_FIXED = re.compile(r"(.+)\[(\d+)\]")
_SEQUENCE = re.compile(r"sequence<(.+?)(?:, *(\d+))?>")
_FLOATS = {
    "float": float(np.finfo(np.float32).max),
    "double": float(np.finfo(np.float64).max),
}
# What a constant may be beside numbers.
_WORDS = ("boolean", "string")
_INTEGERS = {
    name: np.dtype(name)
    for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
}


@dataclass(frozen=True)
class FieldPath:
    """One parsed path.

    Attributes:
        text: As it was given.
        steps: Field name and index, which is None where the field is taken as it is.
    """

    text: str
    steps: tuple[tuple[str, int | None], ...]

    @classmethod
    def parse(cls, text: str) -> FieldPath:
        """Parse a path.

        Raises:
            ConfigurationError: It is no path.
        """
        steps = []
        for part in text.split("."):
            step = _STEP.fullmatch(part)
            if step is None:
                raise ConfigurationError(
                    f"{text!r} is not the path of a field: {part!r} has to be a field's name, "
                    "with an index in brackets where it is an array, as in motor_state[3].q"
                )
            steps.append((step[1], None if step[2] is None else int(step[2])))
        return cls(text, tuple(steps))


def message_class(name: str) -> type[Any]:
    """Import a message class.

    Args:
        name: Such as `sensor_msgs/msg/JointState`.

    Raises:
        ConfigurationError: It is no message's name, or the package is not there.
    """
    found = _TYPE_NAME.fullmatch(name)
    if found is None:
        raise ConfigurationError(
            f"{name!r} is not the name of a message: write it like sensor_msgs/msg/JointState"
        )
    package, kind = found.groups()
    try:
        _refuse_what_holds_no_messages(package)
        message = getattr(importlib.import_module(f"{package}.msg"), kind)
        message.get_fields_and_field_types()
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"the message {name} cannot be imported ({error}): install or build its package, and "
            "source the workspace before the node is started"
        ) from error
    imported: type[Any] = message
    return imported


def _refuse_what_holds_no_messages(package: str) -> None:
    # Looked at before it is imported: importing runs a package, and a parameter file must not
    # choose which of the installed ones.
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    if not any((Path(folder) / "msg" / "__init__.py").is_file() for folder in folders):
        raise ImportError(f"there is no package {package} with messages")


class FieldMap:
    """Named numbers in the fields of one message class.

    Args:
        kind: The message class.
        fields: Name to path; the order is that of the arrays.

    Attributes:
        names: The names.
        paths: The path of each.
        leaves: Type of the number at the end of each path, as the message class names it.
        owners: Steps of a path to the name that it belongs to.

    Raises:
        ConfigurationError: A path does not fit the class, or two names have the same one.
    """

    def __init__(self, kind: type[Any], fields: Mapping[str, str]) -> None:
        self.names = tuple(fields)
        self.paths = tuple(FieldPath.parse(text) for text in fields.values())
        self.leaves = tuple(_check(path, kind) for path in self.paths)
        self.owners: dict[tuple[tuple[str, int | None], ...], str] = {}
        for name, path in zip(self.names, self.paths, strict=True):
            if path.steps in self.owners:
                raise ConfigurationError(
                    f"{self.owners[path.steps]!r} and {name!r} are both in {path.text}; give each "
                    "a field of its own"
                )
            self.owners[path.steps] = name

    def read(self, message: Any) -> Float64Array:
        """Return the fields' values, float64, shape (len(names),).

        Raises:
            ObservationError: A sequence of the message is shorter than an index.
        """
        values = np.empty(len(self.paths), np.float64)
        for place, path in enumerate(self.paths):
            value = message
            for name, index in path.steps:
                value = getattr(value, name)
                if index is None:
                    continue
                if index >= len(value):
                    raise ObservationError(
                        f"{path.text} ({self.names[place]}): {name} has {len(value)} entries in "
                        "this message; the driver sends fewer than the field map expects"
                    )
                value = value[index]
            values[place] = value
        return values

    def write(self, message: Any, values: Float64Array) -> None:
        """Set the fields of a message; sequences grow as far as they have to.

        Args:
            message: Of the map's class. Fields that are not in the map are left as they are.
            values: Shape (len(names),).

        Raises:
            ObservationError: A value does not go into its field: not finite, or out of its range.
        """
        if np.shape(values) != (len(self.paths),):
            raise ValueError(f"{len(self.paths)} values are needed, not {np.shape(values)}")
        # Everything is checked first, so that a message is written wholly or not at all.
        numbers = [
            _number(float(value), leaf, path.text)
            for value, leaf, path in zip(values, self.leaves, self.paths, strict=True)
        ]
        for number, path in zip(numbers, self.paths, strict=True):
            _set(message, path.steps, number)


class FieldStateReader:
    """Reads the policy's state from any message; the counterpart of `joints.JointStateReader`.

    Args:
        state_joints: State key to its joints, in the order of the key's dimensions.
        kind: The message class.
        fields: Joint name to path; may name joints that the policy does not use.
        topic: Named in errors.

    Raises:
        ConfigurationError: A joint has no field, or a path does not fit the class.
    """

    def __init__(
        self,
        state_joints: Mapping[str, Sequence[JointSpec]],
        kind: type[Any],
        fields: Mapping[str, str],
        topic: str,
    ) -> None:
        self._joints = {key: tuple(joints) for key, joints in state_joints.items()}
        self._topic = topic
        wanted = [joint.name for joints in self._joints.values() for joint in joints]
        require_fields(fields, wanted)
        FieldMap(kind, fields)  # a wrong path is told also where the policy does not use it
        self._map = FieldMap(kind, {name: fields[name] for name in dict.fromkeys(wanted)})
        place = {name: index for index, name in enumerate(self._map.names)}
        self._places = {
            key: [place[joint.name] for joint in joints] for key, joints in self._joints.items()
        }

    def read(self, message: Any) -> dict[str, Float32Array]:
        """Return the state, key by key, in the checkpoint's units.

        Returns:
            State key to float32, shape (D,).

        Raises:
            ObservationError: A sequence is too short, or a value is not finite.
        """
        try:
            values = self._map.read(message)
        except ObservationError as error:
            raise ObservationError(f"joint state on {self._topic}: {error}") from error
        state = {}
        for key, places in self._places.items():
            joints = self._joints[key]
            with np.errstate(over="ignore"):
                physical = joint_to_policy(joints, values[places].tolist()).astype(np.float32)
            bad = [joints[i].name for i in np.flatnonzero(~np.isfinite(physical))]
            if bad:
                raise ObservationError(
                    f"joint state on {self._topic}: the position of {', '.join(bad)} is not a "
                    "finite number; the policy is not run on it. Check the joint's encoder and "
                    "driver."
                )
            state[key] = physical
        return state


class FieldWriter:
    """Writes numbers into the fields of one message that is used again and again.

    Args:
        kind: The message class.
        fields: Name to path, in the order of the values. They end at floating-point numbers: a
            whole one would round what is written.
        constants: Path to what always stands there: a number, `true`, `false` or a text.
        parameter: Parameter that the paths come from; named in errors.

    Raises:
        ConfigurationError: A path does not fit the class, is there twice, or a constant does not
            go into its field.
    """

    def __init__(
        self,
        kind: type[Any],
        fields: Mapping[str, str],
        constants: Mapping[str, str],
        parameter: str,
    ) -> None:
        self._map = FieldMap(kind, fields)
        for path, leaf in zip(self._map.paths, self._map.leaves, strict=True):
            if leaf not in _FLOATS:
                raise ConfigurationError(
                    f"parameter '{parameter}': {path.text} is {leaf}, which would round a "
                    "command; name a field of floating-point numbers"
                )
        # One message for all commands: a class with fixed arrays takes milliseconds to make.
        self._message = kind()
        for text, value in constants.items():
            path = FieldPath.parse(text)
            if path.steps in self._map.owners:
                raise ConfigurationError(
                    f"parameter '{parameter}': {text} is the field of "
                    f"{self._map.owners[path.steps]!r} and cannot be constant"
                )
            _set(self._message, path.steps, _constant(value, _check(path, kind, _WORDS), text))

    def write(self, values: Float64Array) -> Any:
        """Return the message with these values, shape (len(fields),); the same one each time.

        Raises:
            ObservationError: A value does not go into its field.
        """
        self._map.write(self._message, values)
        return self._message


def parse_fields(lines: Sequence[str], parameter: str) -> dict[str, str]:
    """Parse lines such as `left_hip = motor_state[0].q`.

    Args:
        lines: Empty ones are skipped.
        parameter: Where they come from; named in errors.

    Raises:
        ConfigurationError: A line has another form, or a name is there twice.
    """
    fields: dict[str, str] = {}
    for line in filter(None, map(str.strip, lines)):
        # From the right: a joint's name is any text, a path has no such sign.
        name, sign, path = (part.strip() for part in line.rpartition("="))
        if not sign or not name:
            raise ConfigurationError(
                f"parameter '{parameter}': {line!r} has to be written like "
                "'left_hip = motor_state[0].q'"
            )
        if name in fields:
            raise ConfigurationError(f"parameter '{parameter}' names {name!r} twice")
        fields[name] = path
    return fields


def parse_joint_fields(
    lines: Sequence[str], type_name: str, *, found_by_name: bool
) -> dict[str, str]:
    """Parse the parameter `joint_state_fields`.

    Args:
        lines: As `parse_fields` takes them.
        type_name: The parameter `joint_state_type`; named in errors.
        found_by_name: Whether that is sensor_msgs/JointState, which needs no fields.

    Raises:
        ConfigurationError: As `parse_fields`, or there are fields that nothing would read.
    """
    fields = parse_fields(lines, "joint_state_fields")
    if fields and found_by_name:
        raise ConfigurationError(
            f"parameter 'joint_state_fields' is for another message than {type_name}, whose "
            "joints are found by their names; set 'joint_state_type', or leave the fields out"
        )
    return fields


def require_fields(fields: Mapping[str, str], joints: Iterable[str]) -> None:
    """Refuse a `joint_state_fields` that leaves a joint out.

    Args:
        fields: Joint name to path.
        joints: Those whose position is needed.

    Raises:
        ConfigurationError: A joint has no field.
    """
    missing = [name for name in dict.fromkeys(joints) if name not in fields]
    if missing:
        raise ConfigurationError(
            f"parameter 'joint_state_fields' has no field for {', '.join(missing)}; add a "
            f"line like '{missing[0]} = path.to.the[0].field'"
        )


def _check(path: FieldPath, kind: type[Any], others: Collection[str] = ()) -> str:
    """Return the type at a path's end, or refuse the path.

    Args:
        path: The path.
        kind: The message class that it begins in.
        others: Types that it may end at beside numbers.
    """
    for position, (name, index) in enumerate(path.steps):
        fields = kind.get_fields_and_field_types()
        where = f"{path.text}: {_shown(kind)}"
        if name not in fields:
            raise ConfigurationError(
                f"{where} has no field {name!r}; it has {', '.join(fields) or 'none'}"
            )
        element = _element(fields[name], index, f"{where}.{name}")
        is_last = position == len(path.steps) - 1
        if is_last:
            if element not in _FLOATS and element not in _INTEGERS and element not in others:
                raise ConfigurationError(f"{where}.{name} is {element}, which is no number")
            return element
        if "/" not in element:
            raise ConfigurationError(f"{where}.{name} is {element}, which has no fields")
        kind = message_class(element)
    raise AssertionError("a path has at least one step")


def _element(type_name: str, index: int | None, where: str) -> str:
    fixed, sequence = _FIXED.fullmatch(type_name), _SEQUENCE.fullmatch(type_name)
    many = fixed or sequence
    if many is None:
        if index is not None:
            raise ConfigurationError(f"{where} is {type_name}, which has no entries to index")
        return type_name
    if index is None:
        raise ConfigurationError(
            f"{where} is {type_name}: say which of its entries, as in {where.split('.')[-1]}[0]"
        )
    limit = many[2]
    if limit is not None and index >= int(limit):
        raise ConfigurationError(f"{where} has {limit} entries, from 0, so there is no [{index}]")
    return str(many[1])


def _shown(kind: type[Any]) -> str:
    return f"{kind.__module__.split('.')[0]}/{kind.__name__}"


def _number(value: float, leaf: str, path: str) -> float | int:
    if leaf in _FLOATS:
        limit = _FLOATS[leaf]
        if not -limit <= value <= limit:
            raise ObservationError(f"{path} cannot hold {value!r}")
        return value
    limits = np.iinfo(_INTEGERS[leaf])
    if not limits.min <= value <= limits.max:
        raise ObservationError(f"{path} cannot hold {value!r}: it goes from {limits.min}")
    whole = round(value)
    if not limits.min <= whole <= limits.max:
        raise ObservationError(f"{path} cannot hold {value!r}: it goes to {limits.max}")
    return whole


def _constant(text: str, leaf: str, path: str) -> float | int | bool | str:
    if leaf == "string":
        return text
    try:
        if leaf == "boolean":
            return {"true": True, "false": False}[text.lower()]
        value = float(text)
        number = _number(value, leaf, path)
    except (KeyError, ValueError, ObservationError) as error:
        raise ConfigurationError(f"{path} is {leaf} and cannot hold {text!r:.80}") from error
    if number != value:
        raise ConfigurationError(f"{path} is {leaf} and cannot hold {text!r:.80}")
    return number


def _set(
    message: Any, steps: tuple[tuple[str, int | None], ...], number: float | int | bool | str
) -> None:
    for name, index in steps[:-1]:
        inner = getattr(message, name)
        if index is not None:
            _grow(message, name, index)
            inner = getattr(message, name)[index]
        message = inner
    name, index = steps[-1]
    if index is None:
        setattr(message, name, number)
        return
    _grow(message, name, index)
    getattr(message, name)[index] = number


def _grow(message: Any, name: str, index: int) -> None:
    # Fixed arrays have their size already, so only sequences can be too short here.
    entries = getattr(message, name)
    missing = index + 1 - len(entries)
    if missing <= 0:
        return
    element = _element(message.get_fields_and_field_types()[name], index, name)
    if "/" in element:
        new: list[Any] = [message_class(element)() for _ in range(missing)]
    else:
        new = [{"boolean": False, "string": ""}.get(element, 0)] * missing
    entries.extend(new)
