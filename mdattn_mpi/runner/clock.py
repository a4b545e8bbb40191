"""Where a rank's time goes, phase by phase; the watchdog is told at every change."""

from __future__ import annotations

from collections import defaultdict
from time import monotonic_ns

from mdattn_mpi.lockstep import Board, Deadlines

OFTEN = 50_000_000  # nanoseconds after which what phases took is looked at


class Spell:
    """A phase with some work: for how long it may last, and has lasted lately. Nanoseconds."""

    __slots__ = ("limit", "longest", "meanwhile", "phase", "spent", "work")

    def __init__(self, phase: str, work: int, meanwhile: tuple[str, ...]) -> None:
        self.phase = phase
        self.work = work
        self.meanwhile = meanwhile or (phase,)
        self.limit = self.longest = self.spent = 0


class PhaseClock:
    """Seconds that the rank's main thread spent in each phase; it is always in one.

    Phases change several times an item, which is felt where items take a millisecond: so one call
    ends a phase and begins the next, with one look at the time, and leaves the rest for later.
    """

    def __init__(self, board: Board, deadlines: Deadlines) -> None:
        self.board = board
        self.deadlines = deadlines
        self.seconds: dict[str, float] = defaultdict(float)
        self._spells: dict[tuple[str, int], Spell] = {}
        self._spell = Spell("", 0, ())  # in which the rank is
        self._since = self._learned = monotonic_ns()

    def enter(
        self, phase: str, item: str = "", work: int = 0, meanwhile: tuple[str, ...] = ()
    ) -> None:
        """End the phase before, and publish the one that begins, with its deadline.

        Parameters
        ----------
        phase, item
            What begins, with which item.
        work
            The item's operations: deadlines are scaled by them.
        meanwhile
            Phases that this rank or others may be in until this one is over, `phase` among them; it
            may last as long as any of those. Always the same for one phase.

        """
        spell = self._spells.get((phase, work)) or self._keep(Spell(phase, work, meanwhile))
        now = self.board.enter(spell.phase, item, 1e-9 * spell.limit)
        before, took = self._spell, now - self._since
        before.spent += took
        if took > before.longest:
            before.longest = took
        self._spell, self._since = spell, now
        if now - self._learned > OFTEN:
            self._learn(now)

    def stop(self) -> None:
        """End the last phase: the rank goes on to what nobody times."""
        now = monotonic_ns()
        self._spell.spent += now - self._since
        self._spell.longest = max(self._spell.longest, now - self._since)
        self._learn(now)
        self._spell = Spell("", 0, ())

    def _keep(self, spell: Spell) -> Spell:
        spell.limit = int(1e9 * self.deadlines.of(spell.meanwhile, spell.work))
        spell.longest = spell.spent = 0
        self._spells[spell.phase, spell.work] = spell
        return spell

    def _learn(self, now: int) -> None:
        """Let deadlines follow what phases have taken, and begin anew."""
        for spell in self._spells.values():
            if spell.spent:
                self.seconds[spell.phase] += 1e-9 * spell.spent
                self.deadlines.took(spell.phase, 1e-9 * spell.longest, spell.work)
        self._spells.clear()
        self._keep(self._spell)
        self._learned = now
