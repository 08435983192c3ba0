"""The handoff: where one writer may stop, and who writes the next token.

Senior and junior write one text between them. At each boundary a coin with probability p for the senior decides who
goes on. The default boundary is the start of a word (West et al., 2025), and a word here is what a reader would call
one, in any script: a token opens a new word unless it continues letters, marks or digits with letters, marks or
digits. So in `<<48/2=24>>` nearly every token may be the other writer's first. That is the pressure of tandem
training as the paper tells it: a senior that has written `<<48/2=` often finds the rest in the hands of a junior that
does not know the notation, and the solution fails. What the senior learns is to write nothing that it could not hand
over. (How much of the effect is this pressure, and how much imitation of the junior: run_gsm8k.py --setting control.)

Schedules, that is, when the coin is tossed:
    token       before every token
    word        before a token that opens a word (the default)
    sentence    before a token that opens a sentence or a line
    paragraph   before a token that opens a line (the paragraphs of a GSM8K solution are its lines)
    redraw      after a token that begins with a space, or 32 tokens after the last toss (Jiao et al., Tandem RL, 2026)

What is exact. With `token` and `redraw` the coin depends only on text that is already written, so the text comes from
a fixed mixture of two policies and summing log pi_senior over the senior's tokens gives the exact policy gradient of
the expected team reward. The others look at the token that the active model *would* write. If the coin then names the
other model, that sample is thrown away although it influenced the outcome, so scoring only kept tokens is a close
approximation (tests/test_gradients.py enumerates a small case of each).

Whether a token opens a word is read from tables over the vocabulary, built once from the bytes of each token, so that
a step of a batch is a few lookups. Not here: sampling and caches (rollout.py).
"""

import unicodedata
from dataclasses import dataclass, fields

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

SCHEDULES = ("token", "word", "sentence", "paragraph", "redraw")
SENTENCE_MARKS = ".!?…。！？"
PROBE = "A word, 48 words"  # what a usable tokenizer can spell

# Letters: B rows of the batch (one rollout each), V vocabulary, C completion.

# ----------------------------------------------------------------------------------------------------------------------
# What a word is


def is_word_character(character: str) -> bool:
    """Letters, marks and digits join into words. Ideographs and kana do not: each is a word of its own."""
    category = unicodedata.category(character)
    if category[0] not in "LM" and category != "Nd":
        return False
    name = unicodedata.name(character, "")
    return not any(script in name for script in ("CJK", "IDEOGRAPH", "HIRAGANA", "KATAKANA"))


def opens_word(before: str, piece: str) -> bool:
    """Whether the token that reads `piece` opens a new word after the text `before`.

    True for the first token and for the end of the sequence (an empty piece). False after a character of which only
    some bytes are written, which decodes to U+FFFD: nobody can take over inside a character.
    """
    if not before:
        return True
    if before[-1] == "\ufffd":
        return False
    return not (piece and is_word_character(before[-1]) and is_word_character(piece[0]))


# ----------------------------------------------------------------------------------------------------------------------
# The same rule as tables over the vocabulary


@dataclass
class Boundaries:
    """What the schedules need to know of each token: tables of shape (V,), boolean except `lacks`."""

    starts_word: torch.Tensor  # its first character is a word character
    ends_word: torch.Tensor  # its last character is one
    continues: torch.Tensor  # it holds only later bytes of a character that an earlier token began
    lacks: torch.Tensor  # how many bytes its last character still lacks (if it continues: minus the bytes it adds)
    leading_space: torch.Tensor  # it begins with a space, as in " sold"
    starts_blank: torch.Tensor  # it begins with white space
    ends_blank: torch.Tensor  # it ends in white space, or in a sentence mark that needs none after it
    blank: torch.Tensor  # it is white space throughout
    ends_line: torch.Tensor  # a line break stands in the white space at its end
    ends_sentence: torch.Tensor  # the same, or a sentence mark before that white space

    def to(self, device: torch.device | str) -> "Boundaries":
        return Boundaries(*(getattr(self, field.name).to(device) for field in fields(self)))


def token_bytes(tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes that each of the `vocab_size` ids of the logits writes; empty for special tokens and unused ids.

    Reads the two spellings in use: byte-level BPE (GPT-2, Llama 3, Qwen), where each byte is one printable character,
    and SentencePiece (Llama 2), where "▁" is a space and "<0xE4>" a byte. Raises ValueError where neither spells a
    probe text: without the spaces there are no word boundaries.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    special = set(tokenizer.all_special_ids)
    printable = {character: byte for byte, character in bytes_to_unicode().items()}

    def spell(piece: str | None) -> bytes:
        if sentencepiece and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:-1], 16)])
        if sentencepiece or any(character not in printable for character in piece):  # the latter: an added token
            return piece.replace("▁", " ").encode()
        return bytes(printable[character] for character in piece)

    sentencepiece = any(piece.startswith("▁") for piece in pieces if piece)
    table = [b"" if piece is None or i in special else spell(piece) for i, piece in enumerate(pieces)]
    table += [b""] * (vocab_size - len(table))
    ids = tokenizer(PROBE, add_special_tokens=False).input_ids
    if b"".join(table[i] for i in ids).strip() != PROBE.encode():
        raise ValueError(
            f"no word boundaries can be derived from {type(tokenizer).__name__} ({tokenizer.name_or_path}): its tokens "
            "do not spell their spaces. Use a model with a byte-level BPE or SentencePiece tokenizer."
        )
    return table


def build_boundaries(pieces: list[bytes]) -> Boundaries:
    """The tables for the bytes of each token (see token_bytes)."""
    columns = zip(*[_describe(piece) for piece in pieces])
    return Boundaries(*[torch.tensor(column) for column in columns])


def _describe(piece: bytes) -> tuple:
    """The row of the tables for one token, in the order of the fields of Boundaries.

    A special token, which writes no bytes, stands between words and opens whatever comes next.
    """
    text, continues, lacks = _text_of(piece)
    stripped = text.rstrip()
    tail = text[len(stripped) :]
    return (
        not opens_word("a", text),
        bool(text) and not opens_word(text, "a"),
        continues,
        lacks,
        text.startswith(" "),
        text[:1].isspace() or not piece,
        text[-1:].isspace() or text[-1:] in tuple("。！？"),
        bool(text) and not stripped,
        "\n" in tail,
        "\n" in tail or stripped[-1:] in tuple(SENTENCE_MARKS),
    )


def _text_of(piece: bytes) -> tuple[str, bool, int]:
    """(text, continues, lacks) of one token. A character that is only begun reads as a neighbour with the same lead.

    The lead bytes tell a letter from an ideograph except for a few symbols (× has the lead of é), so the guess matters
    only where a tokenizer splits such a character.
    """
    own = piece.lstrip(bytes(range(0x80, 0xC0)))  # without what completes an earlier token's character
    if piece and not own:
        return "", True, -len(piece)
    lead = max((i for i, byte in enumerate(own) if byte >= 0xC0), default=None)
    need = 0 if lead is None else {0xC: 2, 0xD: 2, 0xE: 3, 0xF: 4}[own[lead] >> 4]
    lacks = 0 if lead is None else max(0, need - (len(own) - lead))
    for filler in (b"\xa0", b"\x80", b"\x90"):
        try:
            return (own + filler * lacks).decode(), False, lacks
        except UnicodeDecodeError:
            continue
    return own.decode(errors="replace"), False, 0


# ----------------------------------------------------------------------------------------------------------------------
# Who writes the next token


class Handoff:
    """The state of one batch of rollouts: who is active, and what the text so far ends in.

    coins (C, B): uniform numbers in [0, 1). The k-th toss of a row uses coins[k] of that row and names the senior
    where it is below p. They come from a generator of their own, so that p = 1 samples exactly as the senior alone
    does.
    """

    def __init__(self, boundaries: Boundaries, schedule: str, p: float, coins: torch.Tensor, max_gap: int = 32):
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown handoff schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p is the probability that a coin names the senior and lies in [0, 1], got {p}")
        self.boundaries, self.schedule, self.max_gap = boundaries, schedule, max_gap
        self.names_senior = coins < p  # (C, B)
        batch, device = coins.shape[1], coins.device
        false, zero = torch.zeros(batch, dtype=torch.bool, device=device), torch.zeros(batch, dtype=torch.long, device=device)
        self.rows = torch.arange(batch, device=device)  # which rollouts are still in the batch
        self.tosses = zero  # how many coins each has used
        self.senior_active = false
        self.due = ~false  # a toss is due whatever is sampled; so it is at the start
        self.in_word, self.after_blank, self.unit_over = false, false, false
        self.lacks, self.since_toss = zero, zero

    def choose(self, senior_ids: torch.Tensor, junior_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decide on the next token. Both models have sampled one, (B,) each; returns (ids written, senior wrote it)."""
        own = torch.where(self.senior_active, senior_ids, junior_ids)  # the active model's sample
        toss = self.due | self._opens(own)
        coin = self.names_senior[self.tosses, self.rows]
        self.senior_active = torch.where(toss, coin, self.senior_active)
        self.tosses = self.tosses + toss
        self.since_toss = torch.where(toss, 0, self.since_toss)
        written = torch.where(self.senior_active, senior_ids, junior_ids)
        self._advance(written)
        return written, self.senior_active

    def _opens(self, own: torch.Tensor) -> torch.Tensor:
        """Whether the active model's sample (B,) opens a unit of the schedule, and so calls for a toss."""
        table = self.boundaries
        if self.schedule == "word":  # opens_word, as a lookup
            return ~(self.in_word & table.starts_word[own]) & (self.lacks == 0)
        if self.schedule in ("sentence", "paragraph"):
            return self.unit_over & ~table.blank[own] & (self.after_blank | table.starts_blank[own])
        return torch.full_like(self.senior_active, self.schedule == "token")

    def _advance(self, written: torch.Tensor) -> None:
        """Take note of what was written (B,)."""
        table = self.boundaries
        continues = table.continues[written]
        self.in_word = torch.where(continues, self.in_word, table.ends_word[written])
        self.lacks = (table.lacks[written] + torch.where(continues, self.lacks, 0)).clamp(min=0)
        self.after_blank = table.ends_blank[written]
        ends_unit = table.ends_line if self.schedule == "paragraph" else table.ends_sentence
        self.unit_over = ends_unit[written] | (self.unit_over & table.blank[written])
        self.since_toss = self.since_toss + 1
        due = table.leading_space[written] | (self.since_toss >= self.max_gap)
        self.due = due if self.schedule == "redraw" else torch.zeros_like(due)

    def keep(self, index: torch.Tensor) -> None:
        """Drop all rows but `index`: the others have ended."""
        for name in ("rows", "tosses", "senior_active", "due", "in_word", "after_blank", "unit_over", "lacks", "since_toss"):
            setattr(self, name, getattr(self, name)[index])
