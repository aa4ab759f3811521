"""Sentences with numbers in words: a synthetic parallel text in English and German."""

import random

_SUBJECTS = (
    ("i have", "ich habe"), ("we have", "wir haben"), ("he has", "er hat"), ("they have", "sie haben"),
    ("the woman has", "die frau hat"), ("the children have", "die kinder haben"), ("you have", "ihr habt"),
)  # fmt: skip
_VERBS = (("bought", "gekauft"), ("sold", "verkauft"), ("found", "gefunden"), ("seen", "gesehen"))
_THINGS = (
    ("apples", "äpfel"), ("houses", "häuser"), ("books", "bücher"), ("tables", "tische"), ("birds", "vögel"),
    ("flowers", "blumen"), ("cats", "katzen"), ("letters", "briefe"), ("windows", "fenster"), ("cars", "autos"),
)  # fmt: skip
_ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_GERMAN = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
).split()
_GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()


def numeral_sentences(generator: random.Random) -> tuple[str, str]:
    """Returns a random sentence in English and in German, whose verb stands at the end.

    Example:
        >>> numeral_sentences(random.Random(3))
        ('we have sold nine hundred thirty-nine flowers for nine thousand eight hundred ninety-six euros',
         'wir haben neunhundertneununddreißig blumen für neuntausendachthundertsechsundneunzig euro verkauft')
    """
    subject, verb, thing = (generator.choice(words) for words in (_SUBJECTS, _VERBS, _THINGS))
    number, price = generator.randrange(2, 1000), generator.randrange(2, 10_000)
    english = f"{subject[0]} {verb[0]} {english_numeral(number)} {thing[0]} for {english_numeral(price)} euros"
    german = f"{subject[1]} {german_numeral(number)} {thing[1]} für {german_numeral(price)} euro {verb[1]}"
    return english, german


def english_numeral(number: int) -> str:
    """Returns a number of 0..999,999 in English words.

    Example:
        >>> english_numeral(123_042)
        'one hundred twenty-three thousand forty-two'
    """
    _check(number)
    thousands, rest = divmod(number, 1000)
    words = [f"{_english_below_1000(thousands)} thousand"] if thousands else []
    return " ".join(words + ([_english_below_1000(rest)] if rest or not words else []))


def german_numeral(number: int) -> str:
    """Returns a number of 0..999,999 in German words, as one word.

    Example:
        >>> german_numeral(123_042), german_numeral(1_101)
        ('einhundertdreiundzwanzigtausendzweiundvierzig', 'eintausendeinhunderteins')
    """
    _check(number)
    thousands, rest = divmod(number, 1000)
    front = _german_below_1000(thousands)
    # Before "tausend" a final "eins" loses its s.
    front = front.removesuffix("s") if thousands % 100 == 1 else front
    return (f"{front}tausend" if thousands else "") + (_german_below_1000(rest) if rest or not thousands else "")


def _english_below_1000(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    words = [f"{_ENGLISH[hundreds]} hundred"] if hundreds else []
    if rest >= 20:
        tens, units = divmod(rest, 10)
        words.append(_ENGLISH_TENS[tens - 2] + (f"-{_ENGLISH[units]}" if units else ""))
    elif rest or not words:
        words.append(_ENGLISH[rest])
    return " ".join(words)


def _german_below_1000(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    front = f"{_german_unit(hundreds)}hundert" if hundreds else ""
    if rest >= 20:
        tens, units = divmod(rest, 10)
        return front + (f"{_german_unit(units)}und" if units else "") + _GERMAN_TENS[tens - 2]
    return front + (_GERMAN[rest] if rest or not front else "")


def _german_unit(number: int) -> str:
    """The word of 1..9 before another part of the number."""
    return "ein" if number == 1 else _GERMAN[number]


def _check(number: int) -> None:
    if not 0 <= number < 1_000_000:
        raise ValueError(f"Expected a number of 0..999,999 (got {number}). Do pass a smaller one.")
