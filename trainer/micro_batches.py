"""What each rank computes: trees dealt over the ranks by cost, packed into micro-batches of a token budget.

Every rank plans the whole batch and takes its share, so no plan travels; the plan is a pure function of the batch,
the budget and the number of ranks. All ranks get the same number of micro-batches, because a backward pass is a
collective: who has fewer computes fillers, which carry no target.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.trees import FILLER, Piece, TreeBatch, deal, lay_out, pack


def micro_batches(
    pieces: Sequence[Piece], *, token_budget: int, rank: int, ranks: int, at_least_one: bool = True
) -> list[TreeBatch]:
    """The micro-batches of one rank.

    Args:
        pieces: trees of the whole batch.
        token_budget: most tokens of a micro-batch.
        rank: this rank.
        ranks: number of ranks.
        at_least_one: give a filler even when there is nothing at all.
    """
    shares = deal([piece.cost for piece in pieces], ranks)
    packed = [pack([pieces[i].cost for i in share], token_budget) for share in shares]
    count = max(len(batches) for batches in packed)
    if at_least_one:
        count = max(count, 1)
    mine = [[pieces[shares[rank][i]] for i in batch] for batch in packed[rank]]
    return [lay_out(batch) for batch in mine] + [lay_out([FILLER])] * (count - len(mine))
