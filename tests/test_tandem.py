"""The worked cases of the schedules, and what a word is in the scripts of the world."""

import random
import re
import unicodedata
from copy import deepcopy

import pytest
import torch
from tokenizers import AddedToken, pre_tokenizers

from lab.models import token_bytes
from tandem import SCHEDULES, Handoff, decode, opens_word


def walk(pieces: list[bytes], schedule: str = "word") -> tuple[str, list[bool]]:
    """Write `pieces` one by one, whoever is active: (authors, was a coin tossed before each?).

    The coins name the senior, the senior, the junior, the junior, and so on.
    """
    coins = torch.tensor([0.25, 0.25, 0.75, 0.75] * len(pieces))[:, None]
    handoff = Handoff(pieces, schedule, 0.5, coins)
    authors, tosses = "", [0]
    for token in range(len(pieces)):
        authors += "S" if handoff.choose([0], [token], [token])[0] else "J"
        tosses += handoff.tosses
    return authors, [after > before for before, after in zip(tosses, tosses[1:])]


# Texts in tokens, which "|" and "^" separate. A coin is tossed before the first token and at every
# "^". A text that ends with a separator ends with the end token, which writes nothing.
GAP = "|".join("x" * 32)
CASES = {
    "token": ["She^ has^ 2^4^\n^"],
    "word": [
        "Nat|alia^ sold^ 4|8^/^2^=^24^>>^24^\n^She^",
        "sch|ö|n^ l^'^eau^ scho|\u0308|n^_^a",
        "при|вет^ 한|국^三^个^ひ^ら^カ^ナ^a^三",
        # Characters in pieces. The lead byte says whether a letter comes, which joins.
        b"sch|\xc3|\xb6|n^ x^\xe4|\xb8|\x89^\xe4\xb8|\xaa^a^\xf0\x9f|\x98\x80",  # schön x三个a😀
        b"\xd0|\xbf\xd1|\x80\xd0\xb8|\xd0\xb2",  # прив
        b"a\xf0\x9f|\x98|\x80^b",
        b"\xc0| x^ y",  # this byte begins no valid character
        b"a\xf0|",  # not even the end token may cut a character
    ],
    "sentence": [
        "She| has| 24|.|5| clips|.|\n|\n^She| left|.^",  # the point of 24.5 ends no sentence
        "One|.^ 3|.|\n\n^Two|.|\n^Three",
        "她|有|3|个|。^吃|了",  # a full-width mark needs no space after it,
        "她有|3|个。^吃了",  # nor does it need a token of its own
        "clips. ^She|clips\n^He",  # nor does white space
    ],
    "paragraph": [
        "She| has| 24|.|\n|\n^She| left|.|",
        "clips. |She|clips\n| ^He",
        "\n|\n|He",  # a blank line is no paragraph
    ],
    "redraw": [
        "x|x| x^x",  # the toss comes after the space's token
        f"{GAP}^x",
        f"{GAP[:-1]} x^x|x",  # space and gap at one token cost one coin
        f"x| x^{GAP}^x",  # the gap counts from a toss that kept the author
        " x^ x^ x^x",
    ],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_worked_cases(schedule):
    for case in CASES[schedule]:
        data = case if isinstance(case, bytes) else case.encode()
        pieces, marks = re.split(rb"[|^]", data), re.findall(rb"[|^]", data)
        tossed = [True, *(mark == b"^" for mark in marks)]
        assert walk(pieces, schedule)[1] == tossed, case
        if schedule == "word":
            texts = [(decode(b"".join(pieces[:i])), decode(x)) for i, x in enumerate(pieces)]
            assert [opens_word(*two) for two in texts] == tossed, case


# German, Vietnamese; Russian, Greek; Hebrew, Arabic, Persian; Hindi, Bengali, Punjabi; Tamil,
# Sinhala; Thai, Lao; Korean, Chinese, Japanese.
SCRIPTS = [
    "Schöne Äpfel kosten 3,50 €. Größe: 12-mal. Một quả táo giá 5 đồng, tiếng Việt",
    "Сколько яблок осталось? 12 штук. Πόσα μήλα έχει; Έχει 12.",
    "לדני יש 12 תפוחים. لدى سارة ١٢ تفاحة، كم بقي؟ می\u200cخواهم ۱۲ کتاب\u200cها را بخوانم",
    "राम के पास १२ किताबें हैं। कितनी बचीं? রহিমের ১২টি আপেল আছে। ਰਾਮ ਕੋਲ ੧੨ ਕਿਤਾਬਾਂ ਹਨ।",
    "ராமிடம் 12 புத்தகங்கள் உள்ளன. රාම්ට පොත් 12ක් තිබේ. สมชายมีแอปเปิล 12 ลูก ສົມຊາຍມີໝາກໂປມ 12 ໜ່ວຍ",
    "영희는 사과 12개를 가지고 있다. 小明有12个苹果，吃了5个。太郎はリンゴを12個持っています。",
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_characters_in_pieces_of_bytes(text):
    """Letters, marks and digits cut into pieces in 30 ways, as byte-level tokenizers cut them.

    A coin is tossed wherever the whole text opens a word, and never inside a character. Punctuation
    stays whole, since "،" begins with the byte of an Arabic letter.
    """
    data, may_cut = text.encode(), set()
    for i, character in enumerate(text):
        start, end = (len(text[:n].encode()) for n in (i, i + 1))
        in_a_word = unicodedata.category(character)[0] in "LM" or character.isdecimal()
        may_cut |= set(range(start, end if in_a_word else start + 1))
    for seed in range(30):
        rng = random.Random(seed)
        cuts = [0, *(cut for cut in range(1, len(data)) if cut in may_cut and rng.random() < 0.5)]
        pieces = [data[a:b] for a, b in zip(cuts, [*cuts[1:], len(data)])]
        # A byte 10xxxxxx does not begin a character.
        begins = [data[cut] & 0xC0 != 0x80 for cut in cuts]
        opens = [opens_word(decode(data[:cut]), decode(data[cut:])) for cut in cuts]
        assert walk(pieces)[1] == [first and opening for first, opening in zip(begins, opens)]


# Emoji joined into one; a variation selector; a keycap; flags; skin tones; the zero-width
# non-joiner of Persian; combining accents.
UNITS = ["👩\u200d👩\u200d👧| |👩\u200d💻|x", "❤\ufe0f|a", "1\ufe0f\u20e3| ", "🇩🇪|a|🇫🇷"]
UNITS += ["👍\U0001f3fd|👍", "می\u200cخواهم| ", "e\u0301te\u0301|."]


@pytest.mark.parametrize("units", UNITS)
def test_visible_characters_are_never_cut(units):
    """Written a character at a time, there is a toss at the start of each unit, nowhere else."""
    pieces = [character.encode() for character in units.replace("|", "")]
    assert walk(pieces)[1] == [i == 0 for unit in units.split("|") for i in range(len(unit))]


def test_a_schedule_is_added_in_one_place(monkeypatch):
    """All that SCHEDULES names can be chosen, here a toss every third token, and only that."""
    monkeypatch.setitem(SCHEDULES, "thirds", lambda text, recent, piece: len(recent) >= 3)
    assert walk([b"x"] * 7, "thirds") == ("SSSSSSJ", [1, 0, 0, 1, 0, 0, 1])
    with pytest.raises(ValueError, match="unknown schedule 'words'"):
        walk([b"x"], "words")


# ------------------------------------------------------------------------------------------------
# The bytes of every token


@pytest.mark.parametrize("spelling", ["tokenizer", "sentencepiece"])
def test_tokens_spell_the_text(spelling, request):
    """Bytes as printable characters; and "▁" for a space with <0xE4> for a byte."""
    tokenizer = request.getfixturevalue(spelling)
    pieces = token_bytes(tokenizer, len(tokenizer))
    text = "48 words schön 三个 😀\nIn 48/2 = <<48/2=24>>24"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert b"".join(pieces[i] for i in ids).decode().strip() == text
    assert all(pieces[i] == b"" for i in tokenizer.all_special_ids)


def test_added_tokens_and_end_tokens(tokenizer):
    """An added token is plain text, even if each of its letters stands for a byte elsewhere. Some,
    such as <|eot_id|> of Llama 3, are special without being listed among the special tokens."""
    more, n = deepcopy(tokenizer), len(tokenizer)
    more.add_tokens(["Réponse", "▁größer", "<end>", AddedToken("<|eot_id|>", special=True)])
    pieces = token_bytes(more, n + 4, end_ids=[n + 2])
    assert pieces[n:] == ["Réponse".encode(), "▁größer".encode(), b"", b""]
    # Unused ids of wider logits write nothing; narrower logits cannot write an added token.
    assert token_bytes(tokenizer, n + 3)[n:] == [b""] * 3
    assert len(token_bytes(more, n)) == n


def test_a_tokenizer_without_spaces_is_refused(tokenizer):
    toy = deepcopy(tokenizer)
    toy.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="the tokens of .* do not encode their spaces"):
        token_bytes(toy, len(toy))
