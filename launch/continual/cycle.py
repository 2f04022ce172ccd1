"""One partition after the other: validate, update, measure, guard, registry. Exactly once, whatever dies when.

    ROOT/versions, current, ...    the registry
    ROOT/continual/journal/        what was done (`launch.continual.journal`)
    ROOT/continual/rows/DAY.N/     rows of a pass (`launch.continual.rows`); what no later update needs is removed
    ROOT/continual/work/DAY.N/     the update at work

A pass is written to the journal before anything is done for it (`began`), and again when its decision is fixed
(`decided`); what follows a decision can be done twice without a difference. Before `decided` all work goes to folders
of the pass alone. So a process that dies leaves a pass that the next one finishes, to the same end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.errors import RequestError
from data.faults import fault_point
from launch.continual.files import Files
from launch.continual.forgetting import forgotten_users
from launch.continual.guard import Checked, Outcome, check, passes, wanted
from launch.continual.journal import Changes, Day, FileFacts, Journal, Pass, PassState, changes
from launch.continual.log_folder import Listing, LogFolder, UnusableFile, is_response, missing_days, waits_for
from launch.continual.pass_rows import PassRows, is_late_responses, sources
from launch.continual.reasons import Decision, Reason, Told
from launch.continual.registry import Registry, digest_of, folder_digests
from launch.continual.results import Result
from launch.continual.row_folders import replayed_rows
from launch.continual.rows import (
    HELD_OUT,
    TRAIN,
    RowCount,
    unusable,
)
from launch.continual.settings import GapRule, LateRule, RejectRule, ServiceSettings
from launch.continual.updating import Interrupted, Update, Updater


class Cycle:
    """Works through the days of a log. The caller holds the registry's lock."""

    def __init__(
        self,
        log: LogFolder,
        registry: Registry,
        updater: Updater,
        settings: ServiceSettings,
        *,
        clock: Callable[[], float],
        files: Files,
    ) -> None:
        """
        Args:
            log: read only.
            registry: serves a version already (`begin_registry`).
            updater: trains and measures.
            settings: the rules.
            clock: seconds since 1970.
            files: how the disk is changed.
        """
        self._log = log
        self._registry = registry
        self._updater = updater
        self._settings = settings
        self._clock = clock
        self._files = files
        root = registry.root / "continual"
        self._journal = Journal(root / "journal", files)
        self._work = root / "work"
        self._rows = PassRows(root / "rows", log, registry, updater, self._journal, settings, files)

    def run(self, first_day: str = "") -> list[Result]:
        """Finish the pass that is open, then take every complete day with something new, in order.

        Returns:
            One result for every pass that ended now and every day that waits.

        Raises:
            RequestError: a damaged journal or registry, or an update that its recipe does not allow.
            RunError: the update failed, or the disk refused; the next start goes on.
        """
        self._recover()
        results: list[Result] = []
        day = ""
        try:
            for one in self._journal.passes():
                if one.state is not PassState.DONE:
                    day = one.day
                    results.append(self._finish(one))
            waits = False
            for day in self._log.days():
                if day >= first_day:
                    ended = self._run_day(day, waits=waits)
                    waits = waits or any(result.decision is Decision.WAITING for result in ended)
                    results += ended
        except Interrupted:
            results.append(Result(day=day, decision=Decision.WAITING, reasons=(Told(reason=Reason.INTERRUPTED),)))
        return results

    def _run_day(self, day: str, *, waits: bool) -> list[Result]:
        """Every pass that the day needs now."""
        results = []
        while isinstance(planned := self._plan(day, waits=waits), Pass):
            self._journal.write(planned)
            results.append(Result.of(planned) if planned.state is PassState.DONE else self._finish(planned))
        return results if planned is None else [*results, planned]

    def plan(self, first_day: str = "") -> list[Result]:
        """What `run` would begin with, without changing anything."""
        results: list[Result] = []
        waits = False
        for day in self._log.days():
            if day < first_day:
                continue
            planned = self._journal.day(day).open or self._plan(day, waits=waits)
            if isinstance(planned, Pass):
                would = planned.decision or Decision.WAITING
                told = planned.reasons if planned.decision else (*planned.reasons, Told(reason=Reason.WOULD_RUN))
                results.append(Result(day=day, decision=would, reasons=told))
            elif planned is not None:
                results.append(planned)
                waits = True
        return results

    def _recover(self) -> None:
        self._registry.recover()
        self._journal.recover()
        for folder in (self._rows.root, self._work):
            self._files.make_folder(folder)
            self._files.clear_leftovers(folder)
        self._sweep()

    # --- planning ---

    def _plan(self, day: str, *, waits: bool) -> Pass | Result | None:
        """A pass to begin (or one that is done at once), a result that says why the day waits, or nothing to do."""
        listing = self._log.listing(day)
        known = self._journal.day(day)
        if known.passes and not self._news(known, listing).to_read:
            return None
        missing = missing_days(day, [other for other in self._log.days() if other < day])
        told = waits_for(listing, self._settings.complete, self._clock())
        if told is None and self._settings.gaps is GapRule.WAIT and (waits or missing):
            told = Told(reason=Reason.EARLIER_DAY_WAITS, found=", ".join(missing))
        if told is not None:
            return Result(day=day, decision=Decision.WAITING, reasons=(told,))
        facts = self._log.facts(listing, known.files)
        changed = self._news(known, listing)
        names, late = changed.to_read, changed.told()
        if known.passes and all(map(is_response, names)):
            late = (Told(reason=Reason.LATE_RESPONSES, found=", ".join(names)),)
        if not known.passes:
            names = tuple(sorted((*(listing.promised or listing.exposures), *listing.responses)))
            later = [one.day for one in self._journal.passes() if one.day > day]
            late = (Told(reason=Reason.LATE_DAY, found=f"{max(later)} was begun"),) if later else ()
        notes = [Told(reason=Reason.MISSING_DAY, found=", ".join(missing))] if missing else []
        begun = self._begin(day, {name: facts[name] for name in names}, (*notes, *late))
        # Of a day that was skipped nothing was used, so that its repair is not late; late responses are no late rows.
        unused = (known.passes and not known.used) or all(map(is_response, names))
        refused = late and not unused and self._settings.late is LateRule.QUARANTINE
        return self._skipped(begun, ()) if refused else begun

    def _news(self, known: Day, listing: Listing) -> Changes:
        """What came or changed since a day was done; responses alone count from time to time only, to save reading."""
        found = changes(known.files, self._log.facts(listing, known.files))
        exposures = found.of(lambda name: not is_response(name))
        if exposures.to_read or not known.passes:
            return exposures if known.passes else found
        last = max(one.decided_at or one.began_at for one in known.passes)
        due = self._clock() >= last + self._settings.late_responses_every_s
        return found if due else exposures

    def _begin(self, day: str, facts: dict[str, FileFacts], notes: Sequence[Told]) -> Pass:
        current = self._registry.current()
        if current is None:
            raise RequestError(str(self._registry.root), "serves no version", "a registry with a promoted version")
        return Pass(
            day=day,
            number=len(self._journal.day(day).passes),
            order=len(self._journal.passes()),
            state=PassState.BEGAN,
            files=facts,
            parent=current.number,
            candidate=max(self._registry.numbers()) + 1,
            began_at=self._clock(),
            reasons=tuple(notes),
        )

    # --- one pass ---

    def _finish(self, one: Pass) -> Result:
        """Take a pass from where it is to its end."""
        if one.state is PassState.DECIDED and self._still_holds(one):
            return self._apply(one)
        decided = self._decide(self._renewed(one))
        self._journal.write(decided)
        fault_point("decided")
        if decided.state is not PassState.DONE:
            return self._apply(decided)
        self._sweep()
        return Result.of(decided)

    def _renewed(self, one: Pass) -> Pass:
        """The pass as it began, or begun anew where its files or the served version changed since."""
        listing = self._log.listing(one.day)
        facts = self._log.facts(listing, one.files)
        now = {name: facts[name] for name in one.files if name in facts}
        current = self._registry.current()
        assert current is not None
        same = {name: found.digest for name, found in now.items()} == {n: f.digest for n, f in one.files.items()}
        if one.state is PassState.BEGAN and same and one.parent == current.number:
            return one
        for folder in (self._work / one.name, self._rows.root / one.name):
            if folder.exists():
                self._files.remove_folder(folder)
        notes = tuple(told for told in one.reasons if told.reason not in (Reason.GUARD, Reason.GUARD_PASSED))
        fresh = replace(self._begin(one.day, now, notes), number=one.number, order=one.order)
        self._journal.write(fresh)
        return fresh

    def _decide(self, one: Pass) -> Pass:
        """Validate, update, measure and guard."""
        try:
            report = self._rows.read(one)
        except UnusableFile as error:
            return self._skipped(one, (error.told,))
        one = replace(one, counts=report.counts)
        corrected = self._rows.corrected(one)
        if corrected and not is_late_responses(one):
            found = f"{report.counts[RowCount.CORRECTED]} rows have a response now and had none"
            one = replace(one, reasons=(*one.reasons, Told(reason=Reason.LATE_RESPONSES, found=found)))
        if is_late_responses(one):
            return self._skipped(one, (), keep=corrected)
        if len(report.policies) > 1:
            mixed = ", ".join(f"{count} of {name}" for name, count in report.policies.items())
            one = replace(one, reasons=(*one.reasons, Told(reason=Reason.MIXED_POLICIES, found=mixed)))
        told = unusable(report, self._settings.rows)
        if told is not None:
            return self._skipped(one, (told,), keep=corrected)
        trained = (f"{one.name}/{TRAIN}", *corrected, *self._rows.carry())
        folders = self._rows.folders
        lacking = self._updater.lacks(folders.rows(trained), folders.responses(trained))
        if lacking:
            few = Told(reason=Reason.TOO_FEW_ROWS, found=f"{lacking}; the next one has them")
            return self._skipped(one, (few,), keep=(*sources(one), *corrected))
        work, parent = self._work / one.name, self._registry.version(one.parent).path
        self._files.make_folder(work)
        replayed = self._rows.replayed(one, trained)
        feedback = folders.feedback(work / "feedback", trained, replayed=replayed, salt=self._rows.salt(one))
        held_out = folders.feedback(work / HELD_OUT, (f"{one.name}/{HELD_OUT}",))
        if replayed:
            one = replace(one, counts=dict(one.counts) | {RowCount.REPLAYED.value: replayed_rows(feedback)})
        versions = [self._registry.version(number).path for number in self._registry.numbers()]
        task = Update(parent=parent, feedback=feedback, work=work / "update", versions=versions)
        model = self._updater.update(task)
        conditions = self._settings.guard.conditions
        checked = check(conditions, self._updater.measure(model, parent, held_out, feedback, wanted(conditions)))
        return replace(
            one,
            state=PassState.DECIDED,
            decided_at=self._clock(),
            decision=Decision.PROMOTED if passes(checked) else Decision.REJECTED,
            reasons=(*one.reasons, *_verdict(checked)),
            metrics={"guard": [each.record() for each in checked], "trained": list(trained)},
            model=model.resolve().relative_to(work.resolve()).as_posix(),
            model_digest=digest_of(folder_digests(model)),
        )

    def _apply(self, one: Pass) -> Result:
        """Let registry and rows follow a decision."""
        promoted = one.decision is Decision.PROMOTED
        if one.candidate not in self._registry.numbers():
            self._registry.add(one.candidate, self._work / one.name / str(one.model), self._lineage(one))
        served = [entry.version for entry in self._registry.promotions()]
        if promoted and one.candidate not in served:
            assert one.decided_at is not None
            self._registry.promote(one.candidate, at=one.decided_at, why=f"update by {one.day}, pass {one.number}")
        carry = self._rows.carry()
        if promoted:
            carry = (f"{one.name}/{HELD_OUT}",)
        else:
            accumulates = self._settings.on_reject is RejectRule.ACCUMULATE
            carry = (*carry, *(sources(one) if accumulates else ()), *self._rows.corrected(one))
        done = replace(one, state=PassState.DONE, carry=carry)
        self._journal.write(done)
        self._sweep()
        return Result.of(done)

    def _skipped(self, one: Pass, told: Sequence[Told], *, keep: Sequence[str] = ()) -> Pass:
        """The pass ended without an update; `keep` are row folders of its own for the next one."""
        return replace(
            one,
            state=PassState.DONE,
            decided_at=self._clock(),
            decision=Decision.SKIPPED,
            reasons=(*one.reasons, *told),
            carry=(*self._rows.carry(), *keep),
        )

    def _sweep(self) -> None:
        """Remove rows and work that nothing will ask for again."""
        opened = {one.name for one in self._journal.passes() if one.state is not PassState.DONE}
        for path in sorted(self._work.iterdir()):
            if path.name not in opened:
                self._files.remove_folder(path)
        self._rows.sweep(opened)

    # --- the model ---

    def _still_holds(self, one: Pass) -> bool:
        """Whether a decision can be followed: its model is there, and nobody switched the served version since."""
        served = [entry.version for entry in self._registry.promotions()]
        if one.decision is Decision.PROMOTED and one.candidate not in served and served[-1] != one.parent:
            return False
        if one.candidate in self._registry.numbers():
            return self._registry.version(one.candidate).digest == one.model_digest
        model = self._work / one.name / str(one.model)
        return model.is_dir() and digest_of(folder_digests(model)) == one.model_digest

    def _lineage(self, one: Pass) -> dict[str, Any]:
        parent = self._registry.version(one.parent)
        return {
            "parent": one.parent,
            "parent_name": parent.name,
            "day": one.day,
            "pass": one.number,
            "files": {name: facts.digest for name, facts in one.files.items()},
            "counts": dict(one.counts),
            "policies": self._rows.policies(one),
            "decision": one.decision,
            "reasons": [{"reason": told.reason, "found": told.found} for told in one.reasons],
            "metrics": one.metrics,
            "decided_at": one.decided_at,
            "forgotten": forgotten_users(self._registry.root),
            "updater": self._updater.describe(),
        }


def begin_registry(registry: Registry, model: Path, *, at: float) -> None:
    """Serve a first version, where none is served yet."""
    if registry.current() is None:
        registry.add(1, model, {"parent": None, "source": str(model)})
        registry.promote(1, at=at, why="the first version")


def _verdict(checked: Sequence[Checked]) -> list[Told]:
    failed = [one for one in checked if one.outcome is not Outcome.HOLDS]
    if failed:
        return [Told(reason=Reason.GUARD, found=str(one)) for one in failed]
    return [Told(reason=Reason.GUARD_PASSED, found=f"{len(checked)} conditions hold")]
