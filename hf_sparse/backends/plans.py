"""Plans that are kept: a pattern meets the same lengths again and again."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from hf_sparse.parts import Scope, with_global_positions
from hf_sparse.patterns import Pattern, parts_of
from hf_sparse.plan import is_faster_whole, make_plan, make_whole_plan
from hf_sparse.tiles import Plan

# of all plans together: random blocks differ by layer, so a model may have a plan for each layer and length
MOST_BYTES = 1 << 29


class PlanCache:
    """The plans that were used last.

    Args:
        most_bytes: what they may hold together; the last one is kept in any case. Masks are made when they are needed, so this
            is looked at whenever a plan is added.

    Attributes:
        misses: how many plans were made.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes, self.misses = most_bytes, 0
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """Return the plan of a key; equal keys get the same object while it is kept."""
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
        plan = make()
        with self._lock:
            self.misses += 1
            self._plans[key] = plan
            held = sum(kept.kept_bytes for kept in self._plans.values())
            while held > self.most_bytes and len(self._plans) > 1:
                _, oldest = self._plans.popitem(last=False)
                held -= oldest.kept_bytes
        return plan

    def clear(self) -> None:
        """Forget all plans, and how many were made."""
        with self._lock:
            self._plans.clear()
            self.misses = 0


PLANS = PlanCache()


def cached_plan(
    pattern: Pattern,
    scope: Scope,
    global_positions: tuple[int, ...] | None,
    invalid: tuple[int, ...],
    rows: str,
    may_be_whole: bool,
) -> Plan:
    """Return the plan of a pattern on one sequence; equal calls get the same object."""

    def make() -> Plan:
        parts = with_global_positions(parts_of(pattern, scope), global_positions)
        plan = make_plan(parts, scope, invalid=invalid, rows=rows)
        if may_be_whole and is_faster_whole(plan, scope.heads):
            return make_whole_plan(parts, scope, invalid=invalid, rows=rows)
        return plan

    return PLANS.get((pattern, scope, global_positions, invalid, rows, may_be_whole), make)
