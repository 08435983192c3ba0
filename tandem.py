"""The handoff: at which tokens may the writer change, and who writes the next token?

In tandem training (West et al., 2025) a trained *senior* and a frozen, weaker *junior* write one solution together. At
every step both models sample a candidate for the next token, each under its own prompt. One of them is *active*. If the
active model's candidate opens a new word, a coin toss decides who is active from then on: the senior with
probability p, else the junior. The model that is now active contributes its own candidate and is recorded as the author.
A trace with p = 0.5, token by token:

    active    senior's   junior's   does the active      coin     written    author
    before    candidate  candidate  one open a word?
    -         "Tom"      "He"       yes (first token)    senior   "Tom"      senior
    senior    "my"       " has"     no                   -        "my"       senior
    senior    " sells"   " has"     yes                  junior   " has"     junior    (" sells" is discarded)
    junior    " 48"      " 4"       yes                  junior   " 4"       junior
    junior    "/"        "8"        no                   -        "8"        junior
    junior    "/"        " clips"   yes                  junior   " clips"   junior

There are five schedules, which differ in when the coin is tossed:

    token       before every token
    word        before a token that opens a word (the paper's, and the default)
    sentence    before a token that begins a sentence or a line
    paragraph   before a token that begins a line (a GSM8K solution has one paragraph per line)
    redraw      after a token that begins with a space, or 32 tokens after the last toss (Jiao et al., Tandem RL, 2026)

In the third row of the trace the senior was active, and its own candidate " sells" caused the toss, but is not part of the
text. (The token that is written after a toss need not open a word itself: had the junior sampled "s" in the third row, the
text would be "Tommys".) Whether the senior's candidate opens a word depends on its weights and affects the text, but a
discarded candidate is not a written token, so the loss has no term for it. Therefore the policy gradient is only
approximate under `word`, `sentence` and `paragraph`. Under `token` and `redraw` the tosses depend only on text that is
already written, and the gradient is exact (if only the senior's own tokens are scored, j = 0, see reinforce.py).
tests/test_gradients.py checks both by enumerating every path of two tiny models.

The file has three parts: the word schedule on strings, which is the definition; tables over the vocabulary, which give the
same answers for token ids; and the handoff for a batch. Models are run and sampled in rollout.py.
"""

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache
from itertools import product

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Shapes: B rollouts in the batch, C completion length, V vocabulary size.

# ----------------------------------------------------------------------------------------------------------------------
# The definition, on strings

# Classes of characters. Whether two neighbours belong together depends on their classes alone.
OTHER, WORD, EXTENDER, JOINER, FLAG = range(5)


def character_class(character: str) -> int:
    """WORD for letters and decimal digits, which join into words. OTHER for what stands alone: punctuation, symbols, spaces.

    Punctuation never joins, so "don't" has a boundary on either side of its apostrophe, and in <<48/2=24>> a
    handoff is possible before nearly every token. Ideographs and kana are letters to Unicode, but each of them counts as a word of
    its own, because Chinese and Japanese are written without spaces.

    The other three keep visible characters whole. An EXTENDER belongs to the character before it: combining marks and vowel
    signs, variation selectors, skin tones, and the zero-width non-joiner inside Persian words. The zero-width JOINER also
    takes the character after it, as in emoji of families. FLAG letters, two of which make a flag, join each other.
    """
    category = unicodedata.category(character)
    if character == "\u200d":
        return JOINER
    if (
        category[0] == "M"
        or character == "\u200c"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
        or "\U000e0020" <= character <= "\U000e007f"
    ):
        return EXTENDER
    if "\U0001f1e6" <= character <= "\U0001f1ff":
        return FLAG
    if category[0] != "L" and category != "Nd":
        return OTHER
    name = unicodedata.name(character, "")
    return OTHER if any(script in name for script in ("CJK", "IDEOGRAPH", "HIRAGANA", "KATAKANA")) else WORD


def joins(left: int, right: int) -> bool:
    """Whether neighbouring characters of these classes belong to one word or one visible character."""
    if right in (EXTENDER, JOINER) or left == JOINER:
        return True
    return left == right and left in (WORD, FLAG)


def opens_word(before: str, piece: str) -> bool:
    """Whether the token whose text is `piece` opens a new word after the text `before`.

    It does unless its first character joins the last one of the text (extenders at the end of the text are skipped).
    The first token opens a word. If the text ends in an incomplete UTF-8 character (U+FFFD after decoding), no token opens
    one, because the character would be split. The end token, which has no text, opens a word too (unless the text ends in an
    incomplete character), so a coin also decides who may end the text.

    >>> opens_word("Natalia", " sold"), opens_word("Nat", "alia"), opens_word("48", "/"), opens_word("/", "2")
    (True, False, True, True)
    """
    # Open in paper: the exact word-boundary rule. This one is ours.
    if not before:
        return True
    if before[-1] == "\ufffd":
        return False
    return not (piece and joins(last_class(before), character_class(piece[0])))


def last_class(text: str) -> int:
    """The class of the last character that is not an extender; EXTENDER if there is none."""
    return next((c for c in map(character_class, reversed(text)) if c != EXTENDER), EXTENDER)


def next_token(before: str, active: str | None, senior_sample: str, junior_sample: str, coin: str) -> tuple[str, str]:
    """One step of the word schedule: returns the text that is written and its author, who is then the active model.

    `active` is the author of the last token, or None before the first. `coin` is the outcome of the coin; it counts only if
    the coin is tossed. This is the trace at the top of the file:

    >>> steps = [("Tom", "He", "senior"), ("my", " has", "junior"), (" sells", " has", "junior"),
    ...          (" 48", " 4", "junior"), ("/", "8", "senior"), ("/", " clips", "junior")]
    >>> text, author = "", None
    >>> for senior_sample, junior_sample, coin in steps:
    ...     written, author = next_token(text, author, senior_sample, junior_sample, coin)
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
        active = coin
    return samples[active], active


# ----------------------------------------------------------------------------------------------------------------------
# The same rule as tables over the vocabulary
#
# Decoding strings at every step of a batch would be slow. Whether a token opens a word depends on the class of its first
# character, on that of the last character of the text, and on whether that character is complete. So a few tables with one
# entry per token, built once, are enough, and a step is a handful of lookups on the device.


@dataclass
class BoundaryTables:
    """What the schedules need to know about each token: tensors of shape (V,), boolean unless said otherwise."""

    first_class: torch.Tensor  # integer: the class of the token's first character
    last_class: torch.Tensor  # integer: the class of its last character that is not an extender (see last_class)
    continues_character: torch.Tensor  # it consists of UTF-8 continuation bytes only, for a character that an earlier token began
    missing_bytes: torch.Tensor  # integer: bytes that its last character lacks; minus its length if it has continuation bytes only
    starts_space: torch.Tensor  # it begins with a space, as " sold" does
    starts_blank: torch.Tensor  # it begins with white space of any kind, or is a special token
    ends_blank: torch.Tensor  # it ends in white space, or in a full-width sentence mark, after which no space is needed
    is_blank: torch.Tensor  # it is nothing but white space
    ends_line: torch.Tensor  # it ends in white space that includes a line break
    ends_sentence: torch.Tensor  # it ends a line, or ends in a sentence mark with or without white space after it

    joins: torch.Tensor  # (5, 5): joins(left, right) as a table over the classes

    def to(self, device: torch.device | str) -> "BoundaryTables":
        return BoundaryTables(*(getattr(self, field.name).to(device) for field in fields(self)))


def token_bytes(tokenizer, vocab_size: int, end_ids: Iterable[int] = ()) -> list[bytes]:
    """The bytes that each id writes: a list of length V (`vocab_size`, the width of the logits).

    Special tokens, tokens that end a text (end_ids) and unused ids write nothing. Two encodings are supported: byte-level
    BPE (GPT-2, Llama 3, Qwen), in which every byte is one printable character, and SentencePiece (Llama 2), in which "▁" is
    a space and "<0xE4>" a single byte. Raises ValueError if a short test sentence is not decoded to what was encoded.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    # Some end tokens, such as <|eot_id|> of Llama 3, are special without being listed among the tokenizer's special ids.
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special_ids = added | {*tokenizer.all_special_ids, *end_ids}
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    # Byte-level BPE never writes "▁" itself, whose three bytes it spells separately.
    is_sentencepiece = any(token.startswith("▁") for token in tokens if token)

    def spell(token: str) -> bytes:
        if is_sentencepiece and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:-1], 16)])
        # A token that was added by hand is plain text, even in a byte-level vocabulary.
        if is_sentencepiece or any(character not in byte_of for character in token):
            return token.replace("▁", " ").encode()
        return bytes(byte_of[character] for character in token)

    pieces = [b"" if token is None or i in special_ids else spell(token) for i, token in enumerate(tokens)]
    pieces += [b""] * (vocab_size - len(pieces))

    # Some tokenizers drop spaces, so that words could not be told apart. (SentencePiece adds one at the start, hence strip.)
    sentence = "A word, 48 words"
    ids = tokenizer(sentence, add_special_tokens=False).input_ids
    if b"".join(pieces[i] for i in ids).strip() != sentence.encode():
        name = f"{type(tokenizer).__name__} ({tokenizer.name_or_path})"
        remedy = "Use a model with a byte-level BPE or SentencePiece tokenizer."
        raise ValueError(f"no word boundaries can be derived from {name}: its tokens do not encode their spaces. {remedy}")
    return pieces


def build_tables(pieces: list[bytes]) -> BoundaryTables:
    """The boundary tables of a vocabulary, given the bytes of each token (see token_bytes)."""
    rows = [_table_row(piece) for piece in pieces]
    columns = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return BoundaryTables(**columns, joins=torch.tensor([[joins(left, right) for right in range(5)] for left in range(5)]))


def _table_row(piece: bytes) -> dict[str, bool | int]:
    """The entries of one token. A special token, which writes no bytes, is a boundary on both sides: it belongs to no word."""
    text, continues_character, missing_bytes = _decode_piece(piece)
    stripped = text.rstrip()
    trailing_space = text[len(stripped) :]
    return {
        "first_class": character_class(text[0]) if text else OTHER,
        "last_class": last_class(text) if text else OTHER,
        "continues_character": continues_character,
        "missing_bytes": missing_bytes,
        "starts_space": text.startswith(" "),
        "starts_blank": text[:1].isspace() or not piece,
        "ends_blank": text[-1:].isspace() or text[-1:] in ("。", "！", "？"),
        "is_blank": bool(text) and not stripped,
        "ends_line": "\n" in trailing_space,
        "ends_sentence": "\n" in trailing_space or stripped[-1:] in tuple(".!?…。！？"),
    }


def _decode_piece(piece: bytes) -> tuple[str, bool, int]:
    """One token as (text, continues_character, missing_bytes). A token need not be valid UTF-8.

    If the last character is incomplete, a typical character with the same leading bytes stands in for it. In most scripts the
    leading bytes determine the class. Exceptions, such as × (which begins like é), matter only where a tokenizer splits
    them.
    """
    # Leading continuation bytes (0x80 to 0xBF) complete the character of an earlier token.
    own = piece.lstrip(bytes(range(0x80, 0xC0)))
    if piece and not own:
        return "", True, -len(piece)
    # The lead byte of the last multi-byte character says how many bytes the character has in all.
    lead = max((i for i, byte in enumerate(own) if byte >= 0xC0), default=len(own))
    length = {0xC: 2, 0xD: 2, 0xE: 3, 0xF: 4}[own[lead] >> 4] if lead < len(own) else 0
    missing = max(0, length - (len(own) - lead))
    if not missing:
        return own.decode(errors="replace"), False, 0
    return own[:lead].decode(errors="replace") + typical_character(own[lead:], missing), False, missing


@cache
def typical_character(first_bytes: bytes, missing: int) -> str:
    """A character of these first bytes and `missing` more, of the class that most such characters have."""
    by_class: dict[int, list[str]] = {}
    # With three bytes missing, every eighth value of each byte is enough.
    for rest in product(range(0x80, 0xC0, 8 if missing == 3 else 1), repeat=missing):
        character = (first_bytes + bytes(rest)).decode(errors="ignore")
        if len(character) == 1 and unicodedata.category(character)[0] != "C" or character in ("\u200c", "\u200d"):
            by_class.setdefault(character_class(character), []).append(character)
    return max(by_class.values(), key=len, default="\ufffd")[0]


# ----------------------------------------------------------------------------------------------------------------------
# Schedules: when is a coin tossed?
#
# One function per schedule. It receives the state of the handoff and the active model's samples (B,), and returns a
# boolean tensor (B,): is a coin tossed before this token is written? To add a schedule, write such a function and name it
# in SCHEDULES. The command line and the setting `granularity` of run_gsm8k.py are built from that dictionary. A schedule
# that needs to know more about the text adds a table above and a state tensor to Handoff.


def before_every_token(state: "Handoff", samples: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(state.senior_active)


def before_a_word(state: "Handoff", samples: torch.Tensor) -> torch.Tensor:
    """opens_word as a lookup."""
    joined = state.tables.joins[state.last_class, state.tables.first_class[samples]]  # (B,)
    return ~joined & (state.missing_bytes == 0)


def before_a_sentence(state: "Handoff", samples: torch.Tensor) -> torch.Tensor:
    """A sentence mark ends a sentence only if white space follows ("3.5" does not end one) or it is full-width, as in Chinese.

    A line break always does. No toss is due until more than white space has been written since the last one (has_written).
    """
    return state.sentence_over & state.has_written & _begins_after_blank(state, samples)


def before_a_paragraph(state: "Handoff", samples: torch.Tensor) -> torch.Tensor:
    return state.line_over & state.has_written & _begins_after_blank(state, samples)


def after_a_space(state: "Handoff", samples: torch.Tensor) -> torch.Tensor:
    """Tandem RL's redraw: after a token that begins with a space. It depends on written text only. After " so" the next writer
    may continue the word with "ld".
    """
    return state.after_space | (state.since_toss >= state.max_gap)


def _begins_after_blank(state: "Handoff", samples: torch.Tensor) -> torch.Tensor:
    """Whether the sample is more than white space and has white space before it, as a new sentence or line needs."""
    return ~state.tables.is_blank[samples] & (state.after_blank | state.tables.starts_blank[samples])


SCHEDULES: dict[str, Callable[["Handoff", torch.Tensor], torch.Tensor]] = {
    "token": before_every_token,
    "word": before_a_word,
    "sentence": before_a_sentence,
    "paragraph": before_a_paragraph,
    "redraw": after_a_space,
}

# ----------------------------------------------------------------------------------------------------------------------
# The handoff for a batch


class Handoff:
    """The state of B unfinished rollouts: who is active in each, and what its text ends in.

    coins (C, B): uniform numbers in [0, 1). The k-th toss of a row uses coins[k] of that row and selects the senior
    if the coin is below p. Coins and the numbers for sampling are drawn separately, so an extra toss does not shift the latter.
    Raises ValueError for an unknown schedule or a p outside [0, 1].
    """

    def __init__(self, tables: BoundaryTables, schedule: str, p: float, coins: torch.Tensor, max_gap: int = 32):
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown handoff schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p is the probability that a coin names the senior and lies in [0, 1], got {p}")
        batch, device = coins.shape[1], coins.device
        self.tables, self.needs_toss, self.max_gap = tables, SCHEDULES[schedule], max_gap
        self.coin_names_senior = coins < p  # (C, B)

        # All state tensors have shape (B,).
        no, zero = torch.zeros(batch, dtype=torch.bool, device=device), torch.zeros(batch, dtype=torch.long, device=device)
        # Which columns of the coins belong to the rows that are still in the batch.
        self.rows = torch.arange(batch, device=device)
        # At the start nobody is active: the forced first toss overwrites senior_active.
        self.at_start, self.senior_active = ~no, no
        # Coins used so far, and tokens written since the last toss (counting the token that followed the toss).
        self.num_tosses, self.since_toss = zero, zero
        # The class of the last character of the text, and how many bytes that character still lacks.
        self.last_class, self.missing_bytes = zero, zero
        # Whether the last token began with a space, and whether the text ends in white space.
        self.after_space, self.after_blank = no, no
        # Whether a sentence or a line is over: nothing but white space has followed its mark or line break.
        self.sentence_over, self.line_over = no, no
        # Whether more than white space has been written since the last toss. Without it, a model might write only a blank line
        # before the next toss.
        self.has_written = no

    def choose(self, senior_ids: torch.Tensor, junior_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the next token of every row. Both models have sampled a candidate, (B,) each.

        Returns the ids that are written, (B,), and whether the senior wrote them, (B,) boolean. This is next_token for a
        batch and for any schedule.
        """
        # 1. Does the active model's own candidate call for a toss?
        active_ids = torch.where(self.senior_active, senior_ids, junior_ids)
        toss = self.at_start | self.needs_toss(self, active_ids)
        # 2. If so, the next unused coin of the row names the writer.
        coin = self.coin_names_senior[self.num_tosses, self.rows]
        self.senior_active = torch.where(toss, coin, self.senior_active)
        self.num_tosses = self.num_tosses + toss
        self.since_toss = torch.where(toss, 0, self.since_toss)
        self.has_written = self.has_written & ~toss
        # 3. The model that is active now writes its candidate; the other candidate is discarded.
        written = torch.where(self.senior_active, senior_ids, junior_ids)
        self._record(written)
        return written, self.senior_active

    def _record(self, written: torch.Tensor) -> None:
        """Update the state of the text's end with the tokens `written` (B,)."""
        tables = self.tables
        continues = tables.continues_character[written]
        # The class stays if the token only extends the last character, or only completes it (whose class its first bytes have decided).
        last = tables.last_class[written]
        self.last_class = torch.where(continues | (last == EXTENDER), self.last_class, last)
        # A token of continuation bytes lowers the number of missing bytes; any other token resets it.
        still_missing = torch.where(continues, self.missing_bytes, 0)
        self.missing_bytes = (still_missing + tables.missing_bytes[written]).clamp(min=0)
        self.after_space, self.after_blank = tables.starts_space[written], tables.ends_blank[written]
        # White space after the end of a sentence or line does not begin a new one.
        is_blank = tables.is_blank[written]
        self.sentence_over = tables.ends_sentence[written] | (self.sentence_over & is_blank)
        self.line_over = tables.ends_line[written] | (self.line_over & is_blank)
        self.has_written = self.has_written | ~is_blank
        self.since_toss = self.since_toss + 1
        self.at_start = torch.zeros_like(self.at_start)

    def select_rows(self, index: torch.Tensor) -> None:
        """Keep only the rows `index`; the other rollouts are finished."""
        for name, value in list(vars(self).items()):
            # The coins (C, B) stay whole: `rows` says which of their columns are still needed.
            if isinstance(value, torch.Tensor) and value.dim() == 1:
                setattr(self, name, value[index])
