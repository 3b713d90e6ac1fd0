"""What a check found, and what all of them say together."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Check", "Errors", "NotChecked", "Report", "run_check"]

Errors = Iterator[tuple[float, str]]


class NotChecked(Exception):
    """There is no way to check this here; the text says why."""


@dataclass(frozen=True)
class Check:
    """One property: its largest error (or -log10 of a p-value), what is allowed, and where it was seen.

    Attributes:
        name: the property.
        error: the largest error seen; NaN where an exception came instead, or where nothing was checked.
        allowed: what passes.
        where: where that was; for what was not checked, why.
        group: the kind of process, where there are several.
        hint: what to look at if it fails.
        checked: False where there was no way to check it. It is then neither passed nor failed.
    """

    name: str
    error: float
    allowed: float
    where: str
    group: str = ""
    hint: str = ""
    checked: bool = True

    @property
    def ok(self) -> bool:
        """Whether it was checked and holds."""
        return self.checked and self.error <= self.allowed  # NaN is not

    @property
    def failed(self) -> bool:
        """Whether it was checked and does not hold."""
        return self.checked and not self.ok

    @property
    def mark(self) -> str:
        return "ok" if self.ok else "FAIL" if self.failed else "not checked"

    @property
    def full_name(self) -> str:
        """The name, behind its group."""
        return f"{self.group}: {self.name}" if self.group else self.name

    def __str__(self) -> str:
        if not self.checked:
            return f"--   {self.name}: not checked, {self.where}"
        said = f"{self.mark:4} {self.name}: {self.error:.2g} (allowed {self.allowed:.2g})"
        if self.ok:
            return said
        return f"{said}, {self.where}" + (f"; look at {self.hint}" if self.hint else "")


@dataclass(frozen=True)
class Report:
    """What was checked of a subject, in order."""

    subject: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; ``unchecked`` says what was not looked at."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the properties that do not hold, each behind its group."""
        return tuple(check.full_name for check in self.checks if check.failed)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """The names of the properties that there was no way to check."""
        return tuple(check.full_name for check in self.checks if not check.checked)

    @property
    def groups(self) -> dict[str, tuple[Check, ...]]:
        """The checks of every kind of process, in order."""
        names = dict.fromkeys(check.group for check in self.checks)
        return {name: tuple(check for check in self.checks if check.group == name) for name in names}

    @property
    def summary(self) -> str:
        passed = sum(check.ok for check in self.checks)
        return f"{passed} hold, {len(self.failed)} do not hold, {len(self.unchecked)} not checked"

    def as_json(self) -> dict[str, object]:
        """Numbers and strings alone; an error that is no number is null."""
        return {
            "subject": self.subject,
            "ok": self.ok,
            "summary": self.summary,
            "checks": [
                {
                    "process": check.group,
                    "name": check.name,
                    "mark": check.mark,
                    "error": check.error if abs(check.error) < float("inf") else None,  # NaN neither
                    "allowed": check.allowed,
                    "where": check.where,
                    "hint": check.hint if check.failed else "",
                }
                for check in self.checks
            ],
        }

    def __str__(self) -> str:
        lines = [self.subject]
        for group, checks in self.groups.items():
            lines += [f"  {group}"] * bool(group) + [f"{'    ' if group else '  '}{check}" for check in checks]
        return "\n".join([*lines, f"  {self.summary}"])


def run_check(name: str, allowed: float, errors: Callable[[], Errors], group: str = "", hint: str = "") -> Check:
    """The worst of some errors and where it was; an exception on the way is a finding, not a crash.

    Where ``errors`` yields nothing, nothing was checked.
    """
    worst, where, seen, why = 0.0, "", False, "nothing here to check it on"
    try:
        for error, place in errors():
            if not seen or not error <= worst:  # NaN is worst
                worst, where, seen = error, place, True
            if worst != worst:
                break
    except NotChecked as reason:
        why = str(reason)
    except Exception as error:
        return Check(name, float("nan"), allowed, f"{type(error).__name__}: {error}", group, hint)
    return Check(name, worst if seen else float("nan"), allowed, where if seen else why, group, hint, seen)
