"""The statistics of a pool: what there is now, what was done so far."""

from __future__ import annotations

import math

from ..budget.ledger import GAVE_WAY
from ..budget.stats import Statistics
from ..runtime.core import Core
from ..sockets import liveness


def statistics_of(core: Core) -> Statistics:
    """Put them together from the parts of a pool; takes no lock, from any thread."""
    ledger, limit, n = core.ledger, core.limit, core.numbers
    totals, closes = ledger.totals, dict(ledger.totals.closes)
    used, waited, connects = totals.used.frozen(), totals.waited.frozen(), totals.connects.frozen()
    return Statistics(
        pid=core.pool_id,
        label=core.section.label,
        limit=None if limit == math.inf else int(limit),
        open=n.open,
        idle=n.idle,
        held=n.held,
        opening=n.opening,
        closing=n.closing,
        waiting=n.waiting,
        peak_held=ledger.peak_held,
        checkouts=used.count + totals.left,
        waits=waited.count,
        timeouts=totals.timeouts,
        rejected=totals.rejected,
        deadlocks=totals.deadlocks,
        bypasses=totals.bypasses,
        connects=connects.count,
        connect_errors=totals.connect_errors,
        closes=closes,
        evictions=closes.get(GAVE_WAY, 0),
        dead=totals.dead,
        failed_resets=totals.failed_resets,
        mended=totals.mended,
        wait_time=waited,
        use_time=used,
        connect_time=connects,
        liveness=liveness.of_all(ledger.everyone()),
        host=None if core.share is None else core.share.statistics(),
        idle_in_transaction=core.idling.times(),
        classes=ledger.class_statistics(),
    )
