"""Drafts of a row's next tokens by prompt lookup (speculative decoding without a draft model).

A response repeats the question, and its incorrect answer begins like its correct one. So what followed the row's last
tokens earlier in the same row is often what comes next. The model checks all drafted tokens in one forward pass, and
accepts those that it would have generated itself (Leviathan et al. 2023, arXiv 2211.17192).
"""

# The longest n-gram that occurred before is continued.
NGRAMS = (3, 2)
LONGEST_DRAFT = 8


class NgramIndex:
    """The tokens of a row, and where each n-gram of them was last followed by another token."""

    def __init__(self, tokens):
        self.tokens, self.followed = [], {}
        for token in tokens:
            self.append(token)

    def append(self, token):
        """Append a token to the row."""
        position = len(self.tokens)
        for n in NGRAMS:
            if position >= n:
                self.followed[tuple(self.tokens[-n:])] = position
        self.tokens.append(token)

    def draft(self, limit):
        """Return at most `limit` tokens that followed the row's last n-gram earlier; an empty list if it is new."""
        for n in NGRAMS:
            position = self.followed.get(tuple(self.tokens[-n:]))
            if position is not None:
                return self.tokens[position : position + limit]
        return []
