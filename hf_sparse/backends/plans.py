"""Plans that are kept: a pattern meets the same lengths again and again."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

from hf_sparse.parts import Scope, with_global_positions
from hf_sparse.patterns import Pattern, parts_of
from hf_sparse.plan import is_faster_whole, make_plan, make_whole_plan
from hf_sparse.tiles import Plan

# of all plans together, in bytes and in number: random blocks differ by layer, so a model may have one for each layer and
# length
MOST_BYTES, MOST_PLANS = 1 << 29, 1024
# plans that are added from one count of what all of them hold to the next
RECOUNT = 32


class PlanCache:
    """The plans that were used last.

    Masks are made when they are needed, so what plans hold is counted when they are added, and anew from time to time.

    Args:
        most_bytes: what they may hold together; the last one is kept in any case.

    Attributes:
        misses: how many plans were made.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes, self.misses = most_bytes, 0
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """Return the plan of a key; equal keys get the same object while it is kept."""
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
        # it may serve a backward pass later, whatever runs now
        with torch.inference_mode(False), torch.device("cpu"):
            plan = make()
        with self._lock:
            self.misses += 1
            self._plans[key] = plan
            self._held += plan.kept_bytes
            if self.misses % RECOUNT == 0 or self._held > self.most_bytes:
                self._held = sum(kept.kept_bytes for kept in self._plans.values())
            # a good part goes at once, so that not every plan that is added makes all be counted
            most = self.most_bytes * (7 if self._held > self.most_bytes else 8) // 8
            while len(self._plans) > 1 and (self._held > most or len(self._plans) > MOST_PLANS):
                _, oldest = self._plans.popitem(last=False)
                self._held -= oldest.kept_bytes
        return plan

    def clear(self) -> None:
        """Forget all plans, and how many were made."""
        with self._lock:
            self._plans.clear()
            self._held = self.misses = 0


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
