"""What each rank computes: rows packed from the whole batch, dealt over the ranks, cut into micro-batches.

Every rank plans the whole batch and takes its share, so no plan travels; the plan is a pure function of the batch,
the settings and the number of ranks. All ranks get the same number of micro-batches, because a backward pass is a
collective: who has fewer rows computes fillers, which carry no target.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.trees import Piece, TreeBatch, deal_rows, lay_out, pack_rows

_FILLER_TOKENS = 64


def micro_batches(
    pieces: Sequence[Piece], *, row_tokens: int, rows: int, rank: int, ranks: int, at_least_one: bool = True
) -> list[TreeBatch]:
    """The micro-batches of one rank.

    Args:
        pieces: trees of the whole batch.
        row_tokens: length of a packed row.
        rows: rows of a full micro-batch; the last one of a rank may have fewer.
        rank: this rank.
        ranks: number of ranks.
        at_least_one: give a filler even when there is nothing at all.
    """
    packing = pack_rows([piece.cost for piece in pieces], row_tokens)
    shares = deal_rows([sum(pieces[i].cost for i in row) for row in packing], ranks)
    count = max(-(-len(share) // rows) for share in shares)
    mine = shares[rank]
    batches = [
        lay_out([[pieces[i] for i in packing[row]] for row in mine[start : start + rows]], row_tokens)
        for start in range(0, len(mine), rows)
    ]
    if at_least_one:
        count = max(count, 1)
    return batches + [lay_out([[]], _FILLER_TOKENS)] * (count - len(batches))
