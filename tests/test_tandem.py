"""The worked cases of the word-boundary schedules, and the tables against the definition on strings."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tandem import EXTENDER, FLAG, JOINER, OTHER, SCHEDULES, WORD, Handoff, build_tables, character_class, opens_word, token_bytes


def authors(pieces: list[bytes], ids: list[int], coins: str, schedule: str, **options) -> tuple[str, int]:
    """Authors of `ids`, whatever the author samples, and the number of coins used, for coins such as "SJ"."""
    numbers = [0.25 if coin == "S" else 0.75 for coin in coins] + [0.25] * (len(ids) + 1 - len(coins))
    handoff = Handoff(build_tables(pieces), schedule, 0.5, torch.tensor(numbers)[:, None], **options)
    who = ""
    for token in ids:
        written, senior = handoff.choose(torch.tensor([token]), torch.tensor([token]))
        assert written.item() == token
        who += "S" if senior.item() else "J"
    return who, handoff.num_tosses.item()


@pytest.mark.parametrize(
    ("spaced", "gap", "ids", "coins", "expected", "used"),
    [
        ([], 32, [1, 2, 3, 4, 5], "SJ", "SSSSS", 1),  # case 1
        ([10], 32, [1, 2, 10, 3], "SJ", "SSSJ", 2),  # case 2: the boundary token is still its old author's
        ([], 4, [1, 2, 3, 4, 5], "SJ", "SSSSJ", 2),  # case 3
        ([9], 3, [1, 1, 9, 2], "SJS", "SSSJ", 2),  # case 4: boundary and gap on one token cost one coin
        ([10], 32, [10, 10, 5], "SSJ", "SSJ", 3),  # case 5: a redraw may keep the author and still starts anew
        ([9], 3, [1, 9, 1, 1, 1, 2], "SSJ", "SSSSSJ", 3),  # the gap counts from the last redraw, which kept the author
    ],
)
def test_redraw_schedule(spaced, gap, ids, coins, expected, used):
    pieces = [b" x" if i in spaced else b"x" for i in range(11)]
    who, tosses = authors(pieces, ids, coins, "redraw", max_gap=gap)
    assert who == expected
    assert tosses == used


WORD_CASES = [  # cases 6 to 8
    ("Nat", "alia", False),
    ("Natalia", " sold", True),
    (" 4", "8", False),
    ("48", "/", True),
    ("/", "2", True),
    ("=", "24", True),
    ("24", ">>", True),
    (">>", "24", True),
    ("24", "\n", True),
    ("24", "", True),  # the end of the sequence
    ("schö", "n", False),
    ("l", "'", True),
    ("'", "eau", True),
    ("三", "个", True),
    ("ひ", "ら", True),
    ("カ", "ナ", True),
    ("при", "вет", False),
    ("한", "국", False),
    ("scho", "\u0308n", False),  # a combining mark
    ("a", "三", True),
    ("_", "a", True),
    ("", "Nat", True),  # the first token
]


@pytest.mark.parametrize(("before", "piece", "opens"), WORD_CASES)
def test_opens_word(before, piece, opens):
    assert opens_word(before, piece) is opens
    assert opens_word("x " + before, piece) is opens  # only the last character counts


SCRIPTS = {
    "German": "Schöne Äpfel kosten 3,50 €. Größe: 12-mal",
    "Vietnamese": "Một quả táo giá 5 đồng, tiếng Việt",
    "Russian": "Сколько яблок осталось? 12 штук",
    "Greek": "Πόσα μήλα έχει; Έχει 12.",
    "Hebrew": "לדני יש 12 תפוחים, כמה נשארו?",
    "Arabic": "لدى سارة ١٢ تفاحة، كم بقي؟",
    "Persian": "می\u200cخواهم ۱۲ کتاب\u200cها را بخوانم",
    "Hindi": "राम के पास १२ किताबें हैं। कितनी बचीं?",
    "Bengali": "রহিমের ১২টি আপেল আছে।",
    "Punjabi": "ਰਾਮ ਕੋਲ ੧੨ ਕਿਤਾਬਾਂ ਹਨ।",
    "Tamil": "ராமிடம் 12 புத்தகங்கள் உள்ளன.",
    "Sinhala": "රාම්ට පොත් 12ක් තිබේ.",
    "Thai": "สมชายมีแอปเปิล 12 ลูก",
    "Lao": "ສົມຊາຍມີໝາກໂປມ 12 ໜ່ວຍ",
    "Korean": "영희는 사과 12개를 가지고 있다.",
    "Chinese": "小明有12个苹果，吃了5个。",
    "Japanese": "太郎はリンゴを12個持っています。",
}


@pytest.mark.parametrize("language", SCRIPTS)
def test_tables_and_definition_agree_in_every_script(language):
    """Letters, marks and digits cut into pieces of bytes in 30 ways, as byte-level tokenizers do: a toss wherever the whole
    text opens a word, and none inside a character. (Punctuation stays whole: "،" begins like an Arabic letter.)"""
    text = SCRIPTS[language]
    data, starts = text.encode(), [len(text[:i].encode()) for i in range(len(text))]
    whole = [character_class(character) not in (WORD, EXTENDER) or character == "\u200c" for character in text]
    spans = [range(start + 1, start + len(c.encode())) for start, c, keep in zip(starts, text, whole) if keep]
    forbidden = {cut for span in spans for cut in span}
    for seed in range(30):
        rng = random.Random(seed)
        cuts = sorted({0, *(cut for cut in range(1, len(data)) if cut not in forbidden and rng.random() < 0.5)})
        pieces = [data[a:b] for a, b in zip(cuts, [*cuts[1:], len(data)])]
        expected = [cut in starts and opens_word(data[:cut].decode(), data[cut:].decode()) for cut in cuts]
        assert tosses_before(pieces) == expected


def tosses_before(pieces: list[bytes]) -> list[bool]:
    """Before which of the tokens, written in this order, a coin is tossed under the word schedule."""
    handoff = Handoff(build_tables(pieces), "word", 0.5, torch.zeros(len(pieces) + 1, 1))
    used = [0]
    for token in range(len(pieces)):
        handoff.choose(torch.tensor([token]), torch.tensor([token]))
        used.append(handoff.num_tosses.item())
    return [after > before for before, after in zip(used, used[1:])]


@pytest.mark.parametrize(
    ("units", "what"),
    [
        (["👩\u200d👩\u200d👧", " ", "👩\u200d💻", "x"], "emoji joined into one"),
        (["❤\ufe0f", "a"], "a variation selector is no letter"),
        (["1\ufe0f\u20e3", " "], "a keycap"),
        (["🇩🇪", "a", "🇫🇷"], "flags"),
        (["👍\U0001f3fd", "👍"], "skin tones"),
        (["می\u200cخواهم", " "], "the zero-width non-joiner of Persian"),
        (["e\u0301te\u0301", "."], "combining accents"),
    ],
)
def test_visible_characters_are_never_cut(units, what):
    """Written a character at a time, there is a toss at the start of each unit and nowhere else."""
    expected = [i == 0 for unit in units for i in range(len(unit))]
    assert tosses_before([character.encode() for unit in units for character in unit]) == expected
    text = "".join(units)
    assert [opens_word(text[:i], text[i]) for i in range(len(text))] == expected


def test_no_toss_inside_a_character():
    assert not opens_word("sch\ufffd", "x")
    assert not opens_word("\ufffd", " ")


@pytest.mark.parametrize(("before", "piece", "opens"), [case for case in WORD_CASES if case[0]])
def test_the_tables_agree_with_the_definition(before, piece, opens):
    """Coins S then J: the second token is the junior's if and only if it opens a word."""
    who, tosses = authors([before.encode(), piece.encode()], [0, 1], "SJ", "word")
    assert (who, tosses) == (("SJ", 2) if opens else ("SS", 1))


@pytest.mark.parametrize(
    ("pieces", "tosses"),
    [
        ([b"sch", b"\xc3", b"\xb6", b"n", b" x"], [1, 0, 0, 0, 1]),  # schön, a byte at a time: one word
        ([b"\xe4", b"\xb8", b"\x89", b"\xe4", b"\xb8", b"\xaa"], [1, 0, 0, 1, 0, 0]),  # 三个: two words
        ([b"\xe4\xb8", b"\x89", b"\xe4\xb8\xaa"], [1, 0, 1]),  # the same in other pieces
        ([b"a\xf0\x9f", b"\x98", b"\x80", b"b"], [1, 0, 0, 1]),  # a😀b
        ([b"\xc0", b" x", b" y"], [1, 0, 1]),  # a byte that only begins an invalid character counts as an incomplete one too
        ([b"\xd0", b"\xbf\xd1", b"\x80\xd0\xb8", b"\xd0\xb2"], [1, 0, 0, 0]),  # прив, pieces across characters
    ],
)
def test_characters_in_pieces(pieces, tosses):
    """No toss after a token that ends inside a character; what a split character was decides on the next token."""
    ids, handoff = range(len(pieces)), Handoff(build_tables(pieces), "word", 0.5, torch.zeros(9, 1))
    seen = []
    for token in ids:
        before = handoff.num_tosses.item()
        handoff.choose(torch.tensor([token]), torch.tensor([token]))
        seen.append(handoff.num_tosses.item() - before)
    assert seen == tosses


@pytest.mark.parametrize(
    ("schedule", "tosses"),
    [
        #             She has 24 . 5 clips .  ⏎  ⏎ She  ...  </s>
        ("token", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("word", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("sentence", [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]),
        ("paragraph", [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]),
    ],
)
def test_units(schedule, tosses):
    pieces = [b"She", b" has", b" 24", b".", b"5", b" clips", b".", b"\n", b"\n", b"She", b" left"]
    handoff = Handoff(build_tables(pieces), schedule, 0.5, torch.zeros(99, 1))
    used = []
    for token in range(len(pieces)):
        handoff.choose(torch.tensor([token]), torch.tensor([token]))
        used.append(handoff.num_tosses.item())
    assert [b - a for a, b in zip([0, *used], used)] == tosses


@pytest.mark.parametrize(("schedule", "expected"), [("sentence", 2), ("paragraph", 1), ("token", 5)])
def test_a_sentence_within_a_line(schedule, expected):
    """ "One. Two" is two sentences of one line; the end mark of "3.5" ends none."""
    pieces = [b"One", b".", b" 3", b".", b"5"]
    assert authors(pieces, list(range(5)), "S", schedule)[1] == expected


@pytest.mark.parametrize("pieces", ["她 有 3 个 。 她 卖 了 1 个", "她有 3 个。 她 卖了 1 个"])
def test_a_full_width_mark_ends_a_sentence_without_a_space(pieces):
    pieces = pieces.split()
    who, tosses = authors([piece.encode() for piece in pieces], list(range(len(pieces))), "SJ", "sentence")
    assert (who.index("J"), tosses) == (pieces.index("她", 1), 2)


@pytest.mark.parametrize(("schedule", "first"), [("sentence", b"clips. "), ("sentence", b"clips\n"), ("paragraph", b"clips\n")])
def test_white_space_at_the_end_of_a_token_counts(schedule, first):
    assert authors([first, b"She"], [0, 1], "SJ", schedule) == ("SJ", 2)


def test_a_thrown_away_sample():
    """The junior is active and samples a new word; the coin names the senior, whose own sample is written instead."""
    pieces = [b"a", b" b", b"c"]
    handoff = Handoff(build_tables(pieces), "word", 0.5, torch.tensor([[0.75], [0.25]]))
    assert handoff.choose(torch.tensor([0]), torch.tensor([2]))[0].item() == 2  # J writes c
    written, senior = handoff.choose(torch.tensor([2]), torch.tensor([1]))  # J samples " b", S samples "c"
    assert (written.item(), senior.item()) == (2, True)  # so S goes on inside J's word, as the rule has it


def test_the_definition_on_every_pair_of_a_vocabulary(tokenizer):
    """Byte-level BPE: for all pairs of tokens that are whole text, the tables say what opens_word says."""
    pieces = token_bytes(tokenizer, len(tokenizer))
    whole = [i for i, piece in enumerate(pieces) if piece and "\ufffd" not in piece.decode(errors="replace")]
    table = build_tables(pieces)
    for i in whole:
        for j in whole:
            joined = bool(table.joins[table.last_class[i], table.first_class[j]])
            assert joined != opens_word(pieces[i].decode(), pieces[j].decode()), (pieces[i], pieces[j])


def test_sentencepiece(sentencepiece):
    """ "▁" is a space and <0xE4> a byte, so pieces spell the text that they decode to."""
    pieces = token_bytes(sentencepiece, len(sentencepiece))
    for text in ("48 words", "schön 三个 😀", "In 48/2 = <<48/2=24>>24\nwords"):
        ids = sentencepiece(text, add_special_tokens=False).input_ids
        assert b"".join(pieces[i] for i in ids).decode().strip() == text
    assert all(pieces[i] == b"" for i in sentencepiece.all_special_ids)


def test_a_tokenizer_without_spaces_is_refused():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "A": 1, "word": 2, ",": 3, "48": 4, "words": 5}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"no word boundaries can be derived from .* \(toy\)"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", name_or_path="toy"), 6)


def test_ids_beyond_the_tokenizer_or_the_logits(tokenizer):
    """Logits wider than the tokenizer: unused ids write nothing. Narrower: a token that was only added is dropped."""
    n = len(tokenizer)
    assert token_bytes(tokenizer, n + 3) == token_bytes(tokenizer, n) + [b""] * 3
    assert token_bytes(tokenizer, n - 1) == token_bytes(tokenizer, n)[:-1]


def test_bad_arguments():
    table = build_tables([b"a"])
    with pytest.raises(ValueError, match="unknown handoff schedule 'words'"):
        Handoff(table, "words", 0.5, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="1.5"):
        Handoff(table, "word", 1.5, torch.zeros(1, 1))


def test_a_schedule_is_added_in_one_place(monkeypatch):
    """Whatever is named in SCHEDULES can be chosen: here a toss every third token."""
    monkeypatch.setitem(SCHEDULES, "every third", lambda state, samples: state.since_toss >= 3)
    assert authors([b"x"], [0] * 7, "SJS", "every third") == ("SSSJJJS", 3)


def test_classes_of_characters():
    expected = {WORD: "aZéßñ9٣й한กक", EXTENDER: "\u0308\ufe0f\u200cि\U0001f3fb\U0001f3ff\U000e0020\U000e007f", JOINER: "\u200d", FLAG: "🇦🇿"}
    expected[OTHER] = " .,'-_/<=#三ひカ々ー🙂\n\u200b"
    for name, characters in expected.items():
        assert [character_class(character) for character in characters] == [name] * len(characters)
