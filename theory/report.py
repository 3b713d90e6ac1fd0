"""Record the result of each check, and collect the results in a report."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Check", "Errors", "NotChecked", "Report", "run_check"]

Errors = Iterator[tuple[float, str]]


class NotChecked(Exception):
    """Raised if a property cannot be checked here; the message gives the reason."""


@dataclass(frozen=True)
class Check:
    """Result for one property: its largest error (or -log10 of a p-value), the tolerance, and the place.

    Attributes:
        name: the property.
        error: the largest error; NaN after an exception, or if nothing was checked.
        allowed: the largest error that passes.
        where: the place of the largest error, or the reason why nothing was checked.
        group: the kind of process, if there are several.
        hint: what to inspect if the check fails.
        checked: False if the property could not be checked; it has then neither passed nor failed.
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
        """Return whether the property was checked and holds."""
        return self.checked and self.error <= self.allowed  # False for NaN

    @property
    def failed(self) -> bool:
        """Return whether the property was checked and does not hold."""
        return self.checked and not self.ok

    @property
    def mark(self) -> str:
        """The word for the result: ok, FAIL or not checked."""
        return "ok" if self.ok else "FAIL" if self.failed else "not checked"

    @property
    def full_name(self) -> str:
        """Return "group: name", or the name alone if there is no group."""
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
    """Results of all checks of one subject, in order."""

    subject: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Return whether no check failed; unchecked properties (``unchecked``) do not count as failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """List the properties that do not hold, as "group: name"."""
        return tuple(check.full_name for check in self.checks if check.failed)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """List the properties that could not be checked, as "group: name"."""
        return tuple(check.full_name for check in self.checks if not check.checked)

    @property
    def groups(self) -> dict[str, tuple[Check, ...]]:
        """Return the checks of every kind of process, in order."""
        names = dict.fromkeys(check.group for check in self.checks)
        return {name: tuple(check for check in self.checks if check.group == name) for name in names}

    @property
    def summary(self) -> str:
        """Text with the numbers of properties that hold, that do not hold and that were not checked."""
        passed = sum(check.ok for check in self.checks)
        return f"{passed} hold, {len(self.failed)} do not hold, {len(self.unchecked)} not checked"

    def as_json(self) -> dict[str, object]:
        """Return the report as JSON values; a NaN or infinite error is null."""
        return {
            "subject": self.subject,
            "ok": self.ok,
            "summary": self.summary,
            "checks": [
                {
                    "process": check.group,
                    "name": check.name,
                    "mark": check.mark,
                    "error": check.error if abs(check.error) < float("inf") else None,  # false for NaN too
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
    """Find the largest error of a property, and the place where it occurred.

    An exception other than NotChecked makes the check fail.

    If ``errors`` yields nothing, or raises NotChecked before it yields an error, the property is unchecked.
    """
    worst, where, seen, why = 0.0, "", False, "nothing here to check it on"
    try:
        for error, place in errors():
            if not seen or not error <= worst:  # NaN is the largest
                worst, where, seen = error, place, True
            if worst != worst:
                break
    except NotChecked as reason:
        why = str(reason)
    except Exception as error:
        return Check(name, float("nan"), allowed, f"{type(error).__name__}: {error}", group, hint)
    return Check(name, worst if seen else float("nan"), allowed, where if seen else why, group, hint, seen)
