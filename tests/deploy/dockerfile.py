"""configs/deploy/Dockerfile read, and built without Docker: each step of a target run in one folder in place of /."""

from __future__ import annotations

import fnmatch
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deploy_files import DEPLOY, REPOSITORY
from dockerfile_parse import DockerfileParser

_ROOTED = re.compile(r"(?<![\w.:/}-])/(?=(?:opt|src|project|cache|usr/local)\b)")
_NEEDS_ROOT = ("useradd", "apt-get")
"""Commands of steps that are left out: they change the machine."""


@dataclass(frozen=True)
class Step:
    """An instruction, such as RUN, and all that follows it."""

    instruction: str
    value: str

    @property
    def flags(self) -> dict[str, str]:
        """``--name=value`` words at its beginning."""
        words = [word[2:].partition("=") for word in self.value.split() if word.startswith("--")]
        return {name: value for name, _, value in words}

    @property
    def rest(self) -> str:
        """Its value without the flags at its beginning."""
        return re.sub(r"^(--\S+\s+)*", "", self.value)


@dataclass
class Stage:
    """A ``FROM`` with its steps."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)


def stages() -> dict[str, Stage]:
    """The stages by name, in order."""
    content = io.BytesIO((DEPLOY / "Dockerfile").read_bytes())
    found: dict[str, Stage] = {}
    for entry in DockerfileParser(fileobj=content).structure:
        step = Step(entry["instruction"].upper(), entry["value"])
        if step.instruction == "FROM":
            base, _, name = step.value.partition(" AS ")
            found[name] = Stage(name, base)
        elif step.instruction != "COMMENT" and found:
            list(found.values())[-1].steps.append(step)
    return found


def steps_of(target: str) -> list[Step]:
    """The steps that make a target's own file system and settings, those of the stages below it first."""
    every = stages()
    stage = every[target]
    return (steps_of(stage.base) if stage.base in every else []) + stage.steps


def stages_for(target: str) -> list[Stage]:
    """The stages that a target is built from, each after those that it needs."""
    every = stages()
    order: dict[str, Stage] = {}

    def add(stage: Stage) -> None:
        sources = [step.flags["from"] for step in stage.steps if "from" in step.flags]
        for name in (stage.base, *sources):
            if name in every:
                add(every[name])
        order.setdefault(stage.name, stage)

    add(every[target])
    return list(order.values())


def environment(target: str) -> dict[str, str]:
    """The ENV of a target."""
    words = [word for step in steps_of(target) if step.instruction == "ENV" for word in step.value.split()]
    return dict(word.split("=", 1) for word in words)


def last(target: str, instruction: str) -> str:
    """The value of an instruction that counts: the last one."""
    return [step.value for step in steps_of(target) if step.instruction == instruction][-1]


def is_sent(path: str) -> bool:
    """Whether .dockerignore leaves a path of the repository in the build context."""
    sent = True
    parents = ["/".join(path.split("/")[: n + 1]) for n in range(path.count("/") + 1)]
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keep, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        deep = pattern.removeprefix("**/")
        if any(
            fnmatch.fnmatchcase(part.rpartition("/")[2] if deep != pattern else part, deep)
            and (deep != pattern or part.count("/") == deep.count("/"))
            for part in parents
        ):
            sent = keep
    return sent


def context_files() -> Iterator[str]:
    """The tracked files that are sent to the builder, as paths in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    yield from (path for path in listed.splitlines() if is_sent(path))


class Build:
    """A target built in a folder that stands for /.

    Attributes:
        left_out: the RUN steps that were not run, because they change the machine.
    """

    def __init__(self, root: Path, arguments: dict[str, str]) -> None:
        """``arguments``: build arguments, in place of the defaults of ARG."""
        self.root = root
        self.left_out: list[str] = []
        self._arguments = arguments
        self._context = root / ".context"

    def target(self, name: str) -> None:
        """Build it; what only earlier stages had is removed afterwards."""
        for path in context_files():
            (self._context / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / path, self._context / path)
        for stage in stages_for(name):
            self._stage(stage)
        kept = {self._path(step.value.split()[-1]) for step in steps_of(name) if step.instruction == "COPY"}
        for folder in (self._context, self._path("/src"), self._path("/project")):
            assert folder not in kept
            shutil.rmtree(folder)

    def command(self, words: list[str], target: str) -> tuple[list[str], dict[str, str]]:
        """An exec form and its environment, to be started outside."""
        env = _machine() | {name: self.rooted(value) for name, value in environment(target).items()}
        path = [*environment(target)["PATH"].split(":"), "/usr/local/bin"]
        env["PATH"] = ":".join([*(str(self._path(p)) for p in path if p.startswith("/")), os.environ["PATH"]])
        words = [self.rooted(word) for word in words]
        found = shutil.which(words[0], path=env["PATH"])
        assert found, words
        return [found, *words[1:]], env

    def rooted(self, text: str) -> str:
        """A text with the image's paths as they are here."""
        return _ROOTED.sub(f"{self.root}/", text)

    def _path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def _stage(self, stage: Stage) -> None:
        work, env, arguments = self.root, _machine(), {}
        for step in [*(steps_of(stage.base) if stage.base in stages() else []), *stage.steps]:
            inherited = step not in stage.steps
            if step.instruction == "WORKDIR":
                work = self._path(step.value)
                work.mkdir(parents=True, exist_ok=True)
            elif step.instruction == "ENV":
                for name, value in (word.split("=", 1) for word in step.value.split()):
                    env[name] = os.path.expandvars(self.rooted(value)) if name == "PATH" else self.rooted(value)
            elif step.instruction == "ARG":
                name, _, default = step.value.partition("=")
                arguments[name] = self._arguments.get(name, default)
            elif step.instruction == "COPY" and not inherited:
                self._copy(step, work)
            elif step.instruction == "RUN" and not inherited:
                self._run(step, work, {**env, **arguments})

    def _run(self, step: Step, work: Path, env: dict[str, str]) -> None:
        if any(command in step.rest for command in _NEEDS_ROOT):
            self.left_out.append(step.rest)
            return
        command = self.rooted(step.rest)
        if command.startswith("python3 -m venv"):  # the base image's Python is the one that runs the tests
            command = command.replace("python3", f"'{getattr(sys, '_base_executable', sys.executable)}'", 1)
        done = subprocess.run(["sh", "-c", command], cwd=work, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"RUN {step.rest}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    def _copy(self, step: Step, work: Path) -> None:
        *sources, to = step.rest.split()
        target = self._path(to) if to.startswith("/") else work / to
        for source in sources:
            origin = self._path(source) if "from" in step.flags else self._context / source
            if origin.is_dir():
                if origin != target:
                    shutil.copytree(origin, target, dirs_exist_ok=True, symlinks=True)
                continue
            file = target / origin.name if to.endswith("/") else target
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(origin, file)
            if "chmod" in step.flags:
                file.chmod(int(step.flags["chmod"], 8))


def _machine() -> dict[str, str]:
    """This process's environment, without what would show its llmctl to that of the image."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def exec_form(value: str) -> list[str]:
    """The words of an exec form; a shell form raises ValueError."""
    words: list[str] = json.loads(value)
    return words
