"""The handoff: at which tokens may the writer change, and who writes the next token?

In tandem training (West et al., 2025) a trained *senior* and a frozen, weaker *junior* write one
solution together. At every step both models sample a candidate for the next token, each under its
own prompt. One of the two is *active*. In the paper, if the active model's candidate opens a new
word, a coin names the model that is active from then on: the senior with probability p, else the
junior. The candidate of the model that is now active is written; the other one is discarded.
A trace with p = 0.5, token by token:

    active    senior's   junior's   does the active      coin     written    author
    before    candidate  candidate  one's open a word?
    -         "Tom"      "He"       yes (first token)    senior   "Tom"      senior
    senior    "my"       " has"     no                   -        "my"       senior
    senior    " sells"   " has"     yes                  junior   " has"     junior
    junior    " 48"      " 4"       yes                  junior   " 4"       junior
    junior    "/"        "8"        no                   -        "8"        junior
    junior    "/"        " clips"   yes                  junior   " clips"   junior

A *schedule* decides when a coin is tossed. The trace uses `word`; there are five:

    token       before every token
    word        before a token that opens a word (the paper's, and the default)
    sentence    before a token that begins a sentence or a line
    paragraph   before a token that begins a line
    redraw      after a token that begins with a space, or 32 tokens after the last toss (Jiao et
                al., 2026)

In the third row of the trace the senior's candidate " sells" caused the toss but is not part of the
text. Its probability therefore affects the text, while the loss has no term for it, so the policy
gradient is only approximate under `word`, `sentence` and `paragraph`. Under `token` and `redraw`
the tosses depend only on text that is already written, and the policy gradient is exact if the loss
is a sum over the senior's own tokens (see reinforce.py). tests/test_gradients.py checks
both. `# Open in paper:` marks a choice that the papers, as far as we know them, leave open.

This file works on text and knows no model. Models are run and sampled in rollout.py.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache

# ------------------------------------------------------------------------------------------------
# What a word is

# Classes of characters. Whether two neighbours belong together depends on their classes alone.
OTHER, WORD, EXTENDER, JOINER, FLAG = "other", "word", "extender", "joiner", "flag"


@cache
def character_class(character: str) -> str:
    """WORD for letters and decimal digits, which join into words; OTHER for what stands alone.

    Punctuation is OTHER, so that in <<48/2=24>> a coin is tossed before nearly every token.
    Ideographs and kana are OTHER too, because Chinese and Japanese are written without spaces.

    The remaining classes keep visible characters whole. An EXTENDER belongs to the character before
    it: accents, vowel signs, skin tones. The zero-width JOINER also takes the character after it,
    as in emoji of families. FLAG letters, two of which make a flag, join each other.
    """
    category = unicodedata.category(character)
    if category == "Cs":
        # Half a character, as `decode` returns it. Its lead byte tells most scripts apart: 0xC3 to
        # 0xE1 begin mostly letters, from Latin to Khmer, 0xEA to 0xED Korean.
        lead = ord(character) - 0xDC00
        return WORD if 0xC3 <= lead <= 0xE1 or 0xEA <= lead <= 0xED else OTHER
    if character == "\u200d":
        return JOINER
    if "\U0001f1e6" <= character <= "\U0001f1ff":
        return FLAG
    is_tone_or_tag = character >= "\U0001f3fb" and category in ("Sk", "Cf")
    if category[0] == "M" or character == "\u200c" or is_tone_or_tag:
        return EXTENDER
    if category[0] != "L" and category != "Nd":
        return OTHER
    name = unicodedata.name(character, "")
    scripts = ("CJK", "IDEOGRAPH", "HIRAGANA", "KATAKANA")
    return OTHER if any(script in name for script in scripts) else WORD


def opens_word(before: str, piece: str) -> bool:
    """Whether a token whose text is `piece` opens a new word after the text `before`.

    It does unless it continues the last word or the last visible character of `before`. Extenders
    at the end of `before` are skipped. After half a character no token opens a word, because that
    would cut the character in two. The end token, which has no text, opens a word: a coin also
    decides who may end the solution.

    >>> opens_word("Natalia", " sold"), opens_word("Nat", "alia"), opens_word("48", "/")
    (True, False, True)
    """
    # Open in paper: the exact word-boundary rule. This one is ours.
    if before and "\udc80" <= before[-1] <= "\udcff":
        return False
    if not before or not piece:
        return True
    classes = map(character_class, reversed(before))
    left = next((c for c in classes if c != EXTENDER), EXTENDER)
    right = character_class(piece[0])
    joined = right in (EXTENDER, JOINER) or left == JOINER
    return not (joined or (left == right and left in (WORD, FLAG)))


def decode(data: bytes) -> str:
    """Bytes as text. Each byte of half a character becomes a surrogate, b"\\xc3" -> "\\udcc3"."""
    return data.decode(errors="surrogateescape")


def next_token(
    before: str, active: str | None, senior_sample: str, junior_sample: str, coins: Iterator[str]
) -> tuple[str, str]:
    """One step of the word schedule: the written text, and its author, who is then active.

    `active` is the author of the last token, None before the first. If a coin is tossed, the next
    of the `coins` names the writer; otherwise none is used. This is the trace at the top of the
    file, in which four coins are tossed:

    >>> samples = [("Tom", "He"), ("my", " has"), (" sells", " has"), (" 48", " 4"), ("/", "8"),
    ...            ("/", " clips")]
    >>> text, author, coins = "", None, iter(["senior", "junior", "junior", "junior"])
    >>> for senior_sample, junior_sample in samples:
    ...     written, author = next_token(text, author, senior_sample, junior_sample, coins)
    ...     text += written
    ...     print(author, repr(text))
    senior 'Tom'
    senior 'Tommy'
    junior 'Tommy has'
    junior 'Tommy has 4'
    junior 'Tommy has 48'
    junior 'Tommy has 48 clips'
    """
    samples = {"senior": senior_sample, "junior": junior_sample}
    # Open in paper: who writes the first token. Here a coin decides, as at every other boundary.
    if active is None or opens_word(before, samples[active]):
        active = next(coins)
    return samples[active], active


# ------------------------------------------------------------------------------------------------
# Schedules: when is a coin tossed?
#
# A schedule is a function that returns whether a coin is tossed before the next token, given
#
#     text     the text so far
#     recent   the texts of the tokens since the last toss, which are the end of `text`
#     piece    the candidate of the active model, as text
#
# To add one, write such a function and name it in SCHEDULES. The first token always has a toss, so
# `recent` is not empty (`text` may be: some tokens have no text). An example of a schedule is
# `lambda text, recent, piece: text.endswith("=")`.

MAX_GAP = 32  # tokens without a toss under `redraw`


def before_every_token(text: str, recent: list[str], piece: str) -> bool:
    return True


def before_a_word(text: str, recent: list[str], piece: str) -> bool:
    return opens_word(text, piece)


def before_a_sentence(text: str, recent: list[str], piece: str) -> bool:
    """A line break ends a sentence; so does a mark before white space (not that in 3.5)."""
    ends = text.rstrip().endswith(tuple(".!?…。！？"))
    return (ends or _at_line_start(text)) and _begins_unit(text, recent, piece)


def before_a_paragraph(text: str, recent: list[str], piece: str) -> bool:
    """A solution of GSM8K has one paragraph per line."""
    return _at_line_start(text) and _begins_unit(text, recent, piece)


def after_a_space(text: str, recent: list[str], piece: str) -> bool:
    """It sees written text only: one model may write " so", and the other go on with "ld"."""
    return recent[-1].startswith(" ") or len(recent) >= MAX_GAP


def _at_line_start(text: str) -> bool:
    return "\n" in text[len(text.rstrip()) :]


def _begins_unit(text: str, recent: list[str], piece: str) -> bool:
    """Whether `piece` begins a new unit, after or with white space, or after a full-width mark.

    The end token counts as beginning with white space. White space alone begins no unit.
    """
    after_blank = text[-1:].isspace() or text.endswith(tuple("。！？"))
    after_blank = after_blank or piece[:1].isspace() or not piece
    # Without the last condition a model might write only a blank line before the next toss.
    return after_blank and not piece.isspace() and not "".join(recent).isspace()


SCHEDULES: dict[str, Callable[[str, list[str], str], bool]] = {
    "token": before_every_token,
    "word": before_a_word,
    "sentence": before_a_sentence,
    "paragraph": before_a_paragraph,
    "redraw": after_a_space,
}

# ------------------------------------------------------------------------------------------------
# The handoff for a batch


class Handoff:
    """Who is active in each of B rollouts, and what has been written: lists with B entries.

    pieces: the bytes of all V tokens. coins (C, B), for completions of at most C tokens: uniform
    numbers in [0, 1). The k-th toss of a rollout uses its coins[k] and names the senior if that is
    below p.
    Raises ValueError for an unknown schedule.
    """

    def __init__(self, pieces: list[bytes], schedule: str, p: float, coins):
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
        self.pieces, self.calls_for_toss = pieces, SCHEDULES[schedule]
        self.coins = (coins < p).T.tolist()  # does the k-th toss of the rollout name the senior?
        batch = len(self.coins)
        self.text = [b""] * batch  # bytes, because a token may end inside a character
        self.recent: list[list[str]] = [[] for _ in range(batch)]  # the pieces since the last toss
        self.senior_active: list[bool | None] = [None] * batch  # None before the first toss
        self.tosses = [0] * batch  # coins used

    def choose(
        self, rows: Sequence[int], senior_ids: Sequence[int], junior_ids: Sequence[int]
    ) -> list[bool]:
        """Decide for each of the rollouts `rows` whether the senior writes the next token.

        senior_ids, junior_ids: the candidates of the two models, one per row. This is next_token
        for a batch and any schedule.
        """
        by_senior = []
        for row, senior_id, junior_id in zip(rows, senior_ids, junior_ids):
            text, recent, senior = decode(self.text[row]), self.recent[row], self.senior_active[row]
            # 1. Does the schedule call for a toss? (Before the first token, senior is None: yes.)
            candidate = decode(self.pieces[senior_id if senior else junior_id])
            if senior is None or self.calls_for_toss(text, recent, candidate):
                # 2. If so, the next unused coin of the rollout names the writer.
                senior = self.senior_active[row] = self.coins[row][self.tosses[row]]
                self.tosses[row] += 1
                recent.clear()
            # 3. The candidate of the model that is now active is written, the other one discarded.
            piece = self.pieces[senior_id if senior else junior_id]
            self.text[row] += piece
            recent.append(decode(piece))
            by_senior.append(senior)
        return by_senior
