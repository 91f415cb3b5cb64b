"""Hard lexical constraints: phrases that an output must, or must not, contain.

Required phrases follow Post and Vilar (2018, "Fast Lexically Constrained Decoding with Dynamic Beam Allocation for
Neural Machine Translation"). A hypothesis competes only with others that contain as many of the required tokens.
Otherwise one that has paid for an unlikely required token would lose to those that have not.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor


Phrase = Sequence[int]


class ForbiddenPhrases(LogitsProcessor):
    """
    Sets the score of each token that would complete a forbidden phrase to -inf.

    Args:
        phrases: for each sentence a list of phrases, each a list of token ids.
    """

    def __init__(self, phrases: Sequence[Sequence[Phrase]]):
        self.phrases = phrases

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`input_ids` `[B * W, T]` so far and `scores` `[B * W, V]` of the next tokens -> the changed scores."""
        width = len(scores) // len(self.phrases)
        scores = scores.clone()  # type: ignore[assignment]
        for row, tokens in enumerate(input_ids.tolist()):
            for phrase in self.phrases[row // width]:
                begun = len(phrase) - 1
                if tokens[len(tokens) - begun :] == list(phrase[:-1]):
                    scores[row, phrase[-1]] = float("-inf")
        return scores


class Progress(NamedTuple):
    """
    How much of a sentence's phrases a hypothesis contains: the numbers of whole phrases, and the partial phrase it ends
    with. No token counts for two phrases.
    """

    met: frozenset[int] = frozenset()
    begun: tuple[int, ...] = ()

    def tokens(self, phrases: Sequence[Phrase]) -> int:
        """The number of required tokens in the hypothesis."""
        return sum(len(phrases[number]) for number in self.met) + len(self.begun)

    def is_complete(self, phrases: Sequence[Phrase]) -> bool:
        """Whether the hypothesis contains all phrases."""
        return len(self.met) == len(phrases)

    def wanted(self, phrases: Sequence[Phrase]) -> set[int]:
        """The tokens that continue or begin a phrase."""
        return {phrases[number][len(self.begun)] for number in self._beginning_with(self.begun, phrases)}

    def after(self, token: int, phrases: Sequence[Phrase]) -> "Progress":
        """The progress after one more token."""
        tail = (*self.begun, token)
        # The token continues the partial phrase, or a suffix of both begins another phrase (as in Aho-Corasick).
        for start in range(len(tail)):
            going_on = self._beginning_with(tail[start:], phrases)
            for number in going_on:
                if len(phrases[number]) == len(tail) - start:
                    return Progress(self.met | {number})
            if going_on:
                return Progress(self.met, tail[start:])
        return Progress(self.met)

    def _beginning_with(self, begin: tuple[int, ...], phrases: Sequence[Phrase]) -> list[int]:
        """The numbers of the missing phrases that begin with `begin`."""
        return [
            number
            for number, phrase in enumerate(phrases)
            if number not in self.met and tuple(phrase[: len(begin)]) == begin
        ]


# A beam with a lower score is a placeholder: at first there are fewer hypotheses than beams.
_NO_HYPOTHESIS = -5e8


class _Candidate(NamedTuple):
    score: float
    beam: int
    token: int
    progress: Progress


class RequiredPhrases:
    """
    The progress of all running hypotheses, and the candidates that a beam search may choose from.

    Args:
        phrases: for each sentence a list of phrases, each a list of token ids. A phrase listed twice is required
            twice.
        width: number of beams W.
    """

    def __init__(self, phrases: Sequence[Sequence[Phrase]], width: int):
        self.phrases = phrases
        self.width = width
        self.progress = [[Progress()] * width for _ in phrases]

    def candidates(
        self, log_probs: torch.Tensor, scores: torch.Tensor, k: int, eos: torch.Tensor | None, is_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            log_probs: of the next token after each beam, `[B, W, V]`. scores: of the beams, `[B, W]`.
            k: number of candidates K, at least 2 W.
            eos: ids that end a sentence.
            is_last: whether this is the last token.

        Returns:
            Scores, beams and tokens, `[B, K]` each: first at most W that end a sentence, then W to continue.
        """
        ends = set(eos.tolist()) if eos is not None else set()
        total = log_probs + scores[:, :, None]
        allowed = total.clone()
        for row, row_progress in enumerate(self.progress):
            for beam, progress in enumerate(row_progress):
                if not progress.is_complete(self.phrases[row]):
                    allowed[row, beam, list(ends)] = float("-inf")
        places = allowed.flatten(1).topk(k).indices
        likeliest = allowed.topk(min(self.width, allowed.shape[2]), dim=2).indices.tolist()
        vocabulary = total.shape[2]
        chosen = []
        for row, row_phrases in enumerate(self.phrases):
            named = {(place // vocabulary, place % vocabulary) for place in places[row].tolist()}
            for beam, progress in enumerate(self.progress[row]):
                named |= {(beam, token) for token in progress.wanted(row_phrases)}
                # At the last token, offer enough candidates for W complete outputs.
                several = self.width if is_last and progress.is_complete(row_phrases) else 1
                named |= {(beam, token) for token in likeliest[row][beam][:several]}
            found = [
                _Candidate(score, beam, token, self.progress[row][beam].after(token, row_phrases))
                for beam, token in named
                if (score := float(total[row, beam, token])) > _NO_HYPOTHESIS
            ]
            chosen.append(self._chosen(sorted(found, key=lambda each: -each.score), row_phrases, k, ends, is_last))
        # [B, K, 3]; MPS has no float64.
        fields = torch.tensor(chosen, dtype=torch.float64, device="cpu").unbind(dim=2)
        scores, parents, tokens = fields[0].float(), fields[1].long(), fields[2].long()
        return scores.to(log_probs.device), parents.to(log_probs.device), tokens.to(log_probs.device)

    def _chosen(
        self, found: list[_Candidate], phrases: Sequence[Phrase], k: int, ends: set[int], is_last: bool
    ) -> list[tuple[float, int, int]]:
        """Chooses K of one sentence's candidates `found`, which are sorted best first."""
        if is_last:
            # All hypotheses end here. Those with a missing phrase come last.
            late = [(each.score + (0.0 if each.progress.is_complete(phrases) else -1e9), *each[1:3]) for each in found]
            late.sort(key=lambda each: -each[0])
            return _filled(late[:k], k)
        complete = [each for each in found if each.progress.is_complete(phrases)][: self.width]
        ending = [each for each in complete if each.token in ends]
        going_on = [each for each in found if each.token not in ends]
        kept = self._allocated(going_on, phrases)
        return _filled([each[:3] for each in ending + kept], k)

    def _allocated(self, found: list[_Candidate], phrases: Sequence[Phrase]) -> list[_Candidate]:
        """W candidates, divided among banks: the candidates of a bank contain equally many required tokens."""
        required = sum(len(phrase) for phrase in phrases)
        banks: dict[int, list[_Candidate]] = {}
        for each in found:
            banks.setdefault(each.progress.tokens(phrases), []).append(each)
        # Most required tokens first: so the phrases are completed even with fewer beams than banks.
        order = sorted(banks, reverse=True)
        share = max(1, self.width // (required + 1))
        kept: list[_Candidate] = []
        for bank in order:
            kept += banks[bank][: min(share, self.width - len(kept))]
        left = sorted((each for bank in order for each in banks[bank][share:]), key=lambda each: -each.score)
        return kept + left[: self.width - len(kept)]

    def advance(self, parents: torch.Tensor, tokens: torch.Tensor) -> None:
        """Updates the progress after the search has chosen beams and tokens, `[B, W]` each."""
        self.progress = [
            [self.progress[row][parent].after(token, self.phrases[row]) for parent, token in zip(*pair, strict=True)]
            for row, pair in enumerate(zip(parents.tolist(), tokens.tolist(), strict=True))
        ]


def _filled(chosen: list[tuple[float, int, int]], k: int) -> list[tuple[float, int, int]]:
    """Pads to K candidates with ones that are worse than any other."""
    return chosen + [(-2e9, 0, 0)] * (k - len(chosen))


def checked_phrases(
    name: str, phrases: Sequence | None, sentences: int, vocab_size: int
) -> list[list[list[int]]] | None:
    """
    Checks the phrases of the argument `name`, and returns them as lists, one for each sentence.

    Raises:
        ValueError: the number of lists is not `sentences`, a phrase is empty, or an id is outside the vocabulary.
    """
    if phrases is None:
        return None
    if len(phrases) != sentences:
        raise ValueError(f"{name} has lists for {len(phrases)} sentences, but there are {sentences}")
    for number, several in enumerate(phrases):
        for phrase in several:
            if not isinstance(phrase, (list, tuple)) or not phrase:
                raise ValueError(f"{name}[{number}] contains {phrase!r}, which is not a list of one or more token ids")
            for token in phrase:
                if not 0 <= token < vocab_size:
                    raise ValueError(f"{name}[{number}] contains token id {token}; ids go from 0 to {vocab_size - 1}")
    return [[list(phrase) for phrase in several] for several in phrases]


def refuse_impossible_phrases(required: list, forbidden: list | None, config: GenerationConfig) -> None:
    """
    Raises:
        ValueError: the search is not a beam search, or no output can contain a required phrase.
    """
    if config.num_beams == 1 or config.do_sample or (config.num_beam_groups or 1) > 1:
        raise ValueError("required_phrases needs beam search: num_beams above 1, without sampling or groups")
    eos = config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    for number, phrase in ((number, phrase) for number, several in enumerate(required) for phrase in several):
        if end := set(ends).intersection(phrase):
            raise ValueError(f"required_phrases[{number}] contains {phrase} with {end.pop()}, which ends a sentence")
        for other in forbidden[number] if forbidden is not None else []:
            places = range(len(phrase) - len(other) + 1)
            if any(phrase[place : place + len(other)] == other for place in places):
                raise ValueError(
                    f"required_phrases[{number}] contains {phrase}, but forbidden_phrases[{number}] forbids {other}"
                )


def refuse_long_phrases(required: Sequence[Sequence[Phrase]], new_tokens: int) -> None:
    """
    Raises:
        ValueError: a sentence's required phrases do not fit into `new_tokens` tokens.
    """
    for number, several in enumerate(required):
        tokens = sum(len(phrase) for phrase in several)
        if several and tokens + 1 > new_tokens:
            raise ValueError(
                f"required_phrases[{number}] contains {tokens} tokens. With the end of the sentence they do not fit "
                f"into {new_tokens} new tokens: raise max_new_tokens or max_length"
            )
