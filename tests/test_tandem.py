"""The worked cases of the schedules, and the handoff of a batch against the definition on text."""

import random
import unicodedata
from copy import deepcopy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tandem
from lab.models import token_bytes
from tandem import SCHEDULES, Handoff, decode, next_token, opens_word


def walk(pieces: list, coins: str = "", schedule: str = "word") -> tuple[str, list[int]]:
    """Write `pieces` one by one, whoever is active: (authors, coins tossed before each piece)."""
    numbers = [0.25 if coin == "S" else 0.75 for coin in coins.ljust(len(pieces), "S")]
    data = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    handoff = Handoff(data, schedule, 0.5, torch.tensor(numbers)[:, None])
    authors, tosses = "", []
    for token in range(len(pieces)):
        before = handoff.tosses[0]
        authors += "S" if handoff.choose([0], [token], [token])[0] else "J"
        tosses.append(handoff.tosses[0] - before)
    return authors, tosses


# Cases 1 to 5 and one more: (text, MAX_GAP, coins, authors, coins used). "_" is a token that begins
# with a space, "x" one that does not.
REDRAW = [
    ("xxxxx", 32, "SJ", "SSSSS", 1),
    ("xx_x", 32, "SJ", "SSSJ", 2),  # the boundary token is still its old author's
    ("xxxxx", 4, "SJ", "SSSSJ", 2),
    ("xx_x", 3, "SJS", "SSSJ", 2),  # boundary and gap on one token cost one coin
    ("__x", 32, "SSJ", "SSJ", 3),  # a redraw may keep the author, and counts anew
    ("x_xxxx", 3, "SSJ", "SSSSSJ", 3),  # the gap counts from the redraw that kept the author
]


@pytest.mark.parametrize(("text", "gap", "coins", "expected", "used"), REDRAW)
def test_redraw(text, gap, coins, expected, used, monkeypatch):
    monkeypatch.setattr(tandem, "MAX_GAP", gap)
    authors, tosses = walk([" x" if token == "_" else "x" for token in text], coins, "redraw")
    assert (authors, sum(tosses)) == (expected, used)


# Cases 6 and 7: pairs "before|piece". The empty piece is the end of the text.
JOINED = ["Nat|alia", " 4|8", "schö|n", "при|вет", "한|국", "scho|\u0308n"]
APART = ["Natalia| sold", "48|/", "/|2", "=|24", "24|>>", ">>|24", "24|\n", "24|", "l|'", "'|eau"]
APART += ["三|个", "ひ|ら", "カ|ナ", "a|三", "_|a", "schön|"]


@pytest.mark.parametrize("case", JOINED + APART)
def test_word(case):
    """By the definition, by the handoff with coins S, J, and by one step with the coin J."""
    before, piece = case.split("|")
    assert opens_word(before, piece) is (case in APART)
    assert opens_word("x " + before, piece) is (case in APART)
    assert walk([before, piece], "SJ") == (("SJ", [1, 1]) if case in APART else ("SS", [1, 0]))
    one_step = next_token(before, "senior", piece, "other", coins=iter(["junior"]))
    assert one_step == (("other", "junior") if case in APART else (piece, "senior"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_first_token_is_tossed_for(schedule):
    """Case 8."""
    assert opens_word("", "Nat")
    assert walk(["Nat"], "J", schedule) == ("J", [1])


# German, Vietnamese, Russian, Greek; Hebrew, Arabic, Persian; Hindi, Bengali, Punjabi; Tamil,
# Sinhala; Thai, Lao, Korean; Chinese, Japanese.
SCRIPTS = [
    "Schöne Äpfel kosten 3,50 €. Größe: 12-mal",
    "Một quả táo giá 5 đồng, tiếng Việt",
    "Сколько яблок осталось? 12 штук",
    "Πόσα μήλα έχει; Έχει 12.",
    "לדני יש 12 תפוחים, כמה נשארו?",
    "لدى سارة ١٢ تفاحة، كم بقي؟",
    "می\u200cخواهم ۱۲ کتاب\u200cها را بخوانم",
    "राम के पास १२ किताबें हैं। कितनी बचीं?",
    "রহিমের ১২টি আপেল আছে।",
    "ਰਾਮ ਕੋਲ ੧੨ ਕਿਤਾਬਾਂ ਹਨ।",
    "ராமிடம் 12 புத்தகங்கள் உள்ளன.",
    "රාම්ට පොත් 12ක් තිබේ.",
    "สมชายมีแอปเปิล 12 ลูก",
    "ສົມຊາຍມີໝາກໂປມ 12 ໜ່ວຍ",
    "영희는 사과 12개를 가지고 있다.",
    "小明有12个苹果，吃了5个。",
    "太郎はリンゴを12個持っています。",
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_characters_in_pieces_of_bytes(text):
    """Letters, marks and digits cut into pieces in 30 ways, as byte-level tokenizers cut them.

    A coin is tossed wherever the whole text opens a word, and never inside a character. Punctuation
    stays whole, since "،" begins with the byte of an Arabic letter.
    """
    data, starts = text.encode(), [len(text[:i].encode()) for i in range(len(text))]
    may_cut = set(starts)
    for start, character in zip(starts, text):
        if unicodedata.category(character)[0] in "LM" or character.isdecimal():
            may_cut |= set(range(start, start + len(character.encode())))
    for seed in range(30):
        rng = random.Random(seed)
        cuts = [0, *(cut for cut in range(1, len(data)) if cut in may_cut and rng.random() < 0.5)]
        pieces = [data[a:b] for a, b in zip(cuts, [*cuts[1:], len(data)])]
        parts = [(decode(data[:cut]), decode(data[cut:])) for cut in cuts]
        assert walk(pieces)[1] == [c in starts and opens_word(*two) for c, two in zip(cuts, parts)]


HALVES = [  # (pieces, tosses before them)
    ([b"sch", b"\xc3", b"\xb6", b"n", b" x"], [1, 0, 0, 0, 1]),  # schön: one word
    ([b"\xe4", b"\xb8", b"\x89", b"\xe4", b"\xb8", b"\xaa"], [1, 0, 0, 1, 0, 0]),  # 三个
    ([b"\xe4\xb8", b"\x89", b"\xe4\xb8\xaa"], [1, 0, 1]),  # the same in other pieces
    ([b"a\xf0\x9f", b"\x98", b"\x80", b"b"], [1, 0, 0, 1]),  # a😀b
    ([b"\xc0", b" x", b" y"], [1, 0, 1]),  # this byte begins no valid character
    ([b"\xd0", b"\xbf\xd1", b"\x80\xd0\xb8", b"\xd0\xb2"], [1, 0, 0, 0]),  # прив
    ([b"a", b"\xc3"], [1, 0]),  # the lead byte says that a letter comes, which joins,
    ([b"a", b"\xe4"], [1, 1]),  # an ideograph,
    ([b"a", b"\xf0\x9f"], [1, 1]),  # or an emoji
    ([b"a\xf0", b""], [1, 0]),  # not even the end token may cut a character
]


@pytest.mark.parametrize(("pieces", "tosses"), HALVES)
def test_half_characters(pieces, tosses):
    assert walk(pieces)[1] == tosses


# Emoji joined into one; a variation selector; a keycap; flags; skin tones; the zero-width
# non-joiner of Persian; combining accents.
UNITS = ["👩\u200d👩\u200d👧| |👩\u200d💻|x", "❤\ufe0f|a", "1\ufe0f\u20e3| ", "🇩🇪|a|🇫🇷"]
UNITS += ["👍\U0001f3fd|👍", "می\u200cخواهم| ", "e\u0301te\u0301|."]


@pytest.mark.parametrize("units", UNITS)
def test_visible_characters_are_never_cut(units):
    """Written a character at a time, there is a toss at the start of each unit, nowhere else."""
    expected = [i == 0 for unit in units.split("|") for i in range(len(unit))]
    text = units.replace("|", "")
    assert walk(list(text))[1] == expected
    assert [opens_word(text[:i], text[i]) for i in range(len(text))] == expected


TWO_LINES = "She| has| 24|.|5| clips|.|\n|\n|She| left|.|"  # it ends with the end token
# (schedule, pieces of a text, those before which a coin is tossed)
UNIT_CASES = [
    ("token", TWO_LINES, TWO_LINES),
    ("sentence", TWO_LINES, "She|She|"),
    ("paragraph", TWO_LINES, "She|She"),
    ("sentence", "One|.| 3|.|5", "One| 3"),  # the point of 3.5 ends no sentence
    ("paragraph", "One|.| 3|.|5", "One"),
    ("sentence", "她|有|3|个|。|吃|了", "她|吃"),  # a full-width mark needs no space after it,
    ("sentence", "她有|3|个。|吃了", "她有|吃了"),  # nor does it need a token of its own
    ("sentence", "clips. |She|clips\n|He", "clips. |She|He"),  # nor does white space
    ("paragraph", "clips. |She|clips\n|He", "clips. |He"),
]


@pytest.mark.parametrize(("schedule", "text", "tossed"), UNIT_CASES)
def test_units(schedule, text, tossed):
    tosses = walk(text.split("|"), schedule=schedule)[1]
    assert [piece for piece, toss in zip(text.split("|"), tosses) if toss] == tossed.split("|")


def test_a_discarded_candidate():
    """The junior's candidate opens a word; the coin names the senior, whose own candidate does not.

    So the senior goes on inside the junior's word, as the rule has it.
    """
    handoff = Handoff([b"a", b" b", b"c"], "word", 0.5, torch.tensor([[0.75], [0.25]]))
    assert handoff.choose([0], senior_ids=[0], junior_ids=[2]) == [False]
    assert handoff.choose([0], senior_ids=[2], junior_ids=[1]) == [True]
    assert (handoff.text, handoff.tosses) == ([b"cc"], [2])


def test_a_schedule_is_added_in_one_place(monkeypatch):
    """Whatever is named in SCHEDULES can be chosen: here a toss every third token."""
    monkeypatch.setitem(SCHEDULES, "thirds", lambda text, since, piece: len(since) >= 3)
    assert walk(["x"] * 7, "SJS", "thirds") == ("SSSJJJS", [1, 0, 0, 1, 0, 0, 1])


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown .*'words'"):
        Handoff([b"a"], "words", 0.5, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="1.5"):
        Handoff([b"a"], "word", 1.5, torch.zeros(1, 1))


# ------------------------------------------------------------------------------------------------
# The bytes of every token


def test_tokens_spell_the_text(tokenizer, sentencepiece):
    """Both spellings: bytes as printable characters, and "▁" for a space with <0xE4> for a byte."""
    for kind in (tokenizer, sentencepiece):
        pieces = token_bytes(kind, len(kind))
        for text in ("48 words", "schön 三个 😀", "In 48/2 = <<48/2=24>>24\nwords"):
            ids = kind(text, add_special_tokens=False).input_ids
            assert b"".join(pieces[i] for i in ids).decode().strip() == text
        assert all(pieces[i] == b"" for i in kind.all_special_ids)


def test_added_tokens_and_end_tokens(tokenizer):
    """An added token is plain text, even if each of its letters stands for a byte elsewhere."""
    more, n = deepcopy(tokenizer), len(tokenizer)
    more.add_tokens(["Réponse", "größer", "<end>"])
    pieces = token_bytes(more, n + 3, end_ids=[n + 2])
    assert pieces[n:] == ["Réponse".encode(), "größer".encode(), b""]
    # Unused ids of wider logits write nothing; narrower logits cannot write an added token.
    plain = token_bytes(tokenizer, n)
    assert token_bytes(tokenizer, n + 3) == plain + [b""] * 3
    assert token_bytes(more, n) == plain


def test_a_tokenizer_without_spaces_is_refused():
    vocabulary = {"<unk>": 0, "A": 1, "word": 2, ",": 3, "48": 4, "words": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    toy = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", name_or_path="toy")
    with pytest.raises(ValueError, match="the tokens of toy do not encode their spaces"):
        token_bytes(toy, 6)
