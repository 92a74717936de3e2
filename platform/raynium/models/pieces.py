"""How many tokens' logits are made at once. Arithmetic, no torch: engines follow it, and the memory plan."""

# What a piece of logits fills at most, however large the vocabulary. Of 150,000 columns that is 447 rows in float32 and
# 894 in bfloat16: each piece passes over the head's weight and its gradient, which fewer rows would not pay for.
LOGITS_BYTES = 2**28


def tokens_of_a_piece(tokens: int, *, token_bytes: int, sum_bytes: int) -> int:
    """Of a micro-batch of so many tokens, with logits of so many bytes each; all of them, if they fit.

    sum_bytes: what pieces need beside: the sum of their gradients of the weight, where that is wider than the weight.
    Pieces that would save nothing are not made. They are of one size where a divisor is near: each size is another
    kernel or graph.
    """
    if tokens * token_bytes <= LOGITS_BYTES + sum_bytes:
        return tokens
    fewest = -(-tokens // max(1, LOGITS_BYTES // token_bytes))
    even = next((number for number in range(fewest, 2 * fewest) if tokens % number == 0), fewest)
    return -(-tokens // even)
