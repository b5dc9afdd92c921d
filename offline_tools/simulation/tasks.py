"""The task of the simulated robot: which cube goes on which plate.

Owns: the names, the sentences and the six tasks. Must not import MuJoCo: the training and the
robot's node speak of tasks without a simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

from groot_int8_ros.errors import ConfigurationError

CUBES = ("red", "green", "blue")
PLATES = ("left", "right")


@dataclass(frozen=True)
class Task:
    """What the robot is asked to do.

    Attributes:
        cube: Colour of the cube to take, one of `CUBES`.
        plate: Side to put it on as the robot sees it, one of `PLATES`.
    """

    cube: str
    plate: str

    @property
    def instruction(self) -> str:
        """The sentence that the policy is given."""
        return f"Put the {self.cube} cube on the {self.plate} plate."

    @property
    def index(self) -> int:
        """Number of the task in `TASKS`."""
        return TASKS.index(self)


TASKS = tuple(Task(cube, plate) for cube in CUBES for plate in PLATES)


def task_of(seed: int) -> Task:
    """Return the task of an episode, so that the same seeds ask for the same everywhere."""
    return TASKS[seed % len(TASKS)]


def parse_task(text: str) -> Task:
    """Read a task from `CUBE/PLATE` or from its instruction.

    Raises:
        ConfigurationError: It is none of the tasks.
    """
    for task in TASKS:
        if text in (f"{task.cube}/{task.plate}", task.instruction):
            return task
    known = ", ".join(f"{task.cube}/{task.plate}" for task in TASKS)
    raise ConfigurationError(f"{text!r} is not a task of the simulation; the tasks are {known}")


def other_task(task: Task, offset: int) -> Task:
    """Return a task with another cube and the other plate.

    Args:
        task: The task.
        offset: Which of the two: any number, odd and even ones give different cubes.
    """
    cube = CUBES[(CUBES.index(task.cube) + 1 + offset % 2) % len(CUBES)]
    plate = PLATES[1 - PLATES.index(task.plate)]
    return Task(cube, plate)
