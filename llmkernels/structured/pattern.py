"""`pattern` of JSON Schema -> a regular expression that a whole JSON string, between its quotes, must match.

A pattern is searched for, in the string's value; XGrammar matches all of the string's text.  So what is not anchored
gets room before and behind, characters that JSON writes with a backslash are written so, and classes leave them out
(a narrower class is still right: every answer matches the pattern).
"""

from collections.abc import Iterable

LAST = 0x10FFFF
Ranges = list[tuple[int, int]]  # of code points, ends included
DIGITS: Ranges = [(48, 57)]
WORDS: Ranges = [(48, 57), (65, 90), (95, 95), (97, 122)]
SPACES: Ranges = [(9, 13), (32, 32), (0xA0, 0xA0), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F)]
LINES: Ranges = [(10, 10), (13, 13), (0x2028, 0x2029)]
ESCAPED: Ranges = [(0, 31), (34, 34), (92, 92), (0xD800, 0xDFFF)]  # what no JSON string holds as it is
LENGTHS: Ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, LAST)]  # of 1, 2, 3, 4 bytes in UTF-8
CLASSES = {"d": DIGITS, "w": WORDS, "s": SPACES}
CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
JSON_ESCAPES = {8: r"\\b", 9: r"\\t", 10: r"\\n", 12: r"\\f", 13: r"\\r", 34: r'\\"', 92: r"\\\\"}


def of_a_json_string(pattern: str) -> str:
    """The regular expression; ValueError where the pattern uses what cannot be enforced."""
    return _Reader(pattern).read()


def of_length(least: int, most: int | None) -> str:
    """The regular expression of all strings of so many characters, without those that JSON escapes."""
    return f"{_set(_complement(ESCAPED))}{{{least},{'' if most is None else most}}}"


class _Reader:
    """Goes through a pattern of ECMA-262 once, from left to right."""

    def __init__(self, pattern: str):
        self.text, self.at = pattern, 0

    def read(self) -> str:
        found = self._alternatives(top=True)
        if self.at < len(self.text):
            raise self._refused("an unmatched )")
        return found

    def _alternatives(self, top: bool) -> str:
        some = _set(_complement(ESCAPED)) + "*"
        found = []
        while True:
            begin = top and self._take("^")
            parts, end = self._sequence(top)
            found.append(("" if begin or not top else some) + parts + ("" if end or not top else some))
            if not self._take("|"):
                return "|".join(found)

    def _sequence(self, top: bool) -> tuple[str, bool]:
        """Terms up to | or ), and whether a $ ended them."""
        parts: list[str] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            if self._take("$"):
                if not top or (self.at < len(self.text) and self.text[self.at] != "|"):
                    raise self._refused("a $ before the end")
                return "".join(parts), True
            parts.append(self._term() + self._repeat())
        return "".join(parts), False

    def _term(self) -> str:
        if self._take("("):
            if self._take("?") and not self._take(":"):
                named = self._take("<") and self.text[self.at : self.at + 1] not in ("=", "!", "")
                if not named or ">" not in self.text[self.at :]:
                    raise self._refused("look-around")
                self.at = self.text.index(">", self.at) + 1
            inside = self._alternatives(top=False)
            if not self._take(")"):
                raise self._refused("a ( that nothing closes")
            return f"(?:{inside})"
        if self._take("["):
            return self._class()
        char = self._next()
        if char == ".":
            return _set(_complement(LINES))
        if char == "\\":
            ranges = self._escape()
            return _set(ranges) if len(ranges) > 1 or ranges[0][0] < ranges[0][1] else _literal(ranges[0][0])
        if char in "^*+?":
            raise self._refused(f"a {char} in this place")
        return _literal(ord(char))

    def _repeat(self) -> str:
        start = self.at
        if self.text[self.at : self.at + 1] == "{":
            end = self.text.find("}", self.at)
            bounds = self.text[self.at + 1 : end].split(",")
            if end < 0 or len(bounds) > 2 or not bounds[0].isdigit() or not (bounds[-1].isdigit() or not bounds[-1]):
                raise self._refused("a { that is no repeat")
            self.at = end + 1
        elif not (self._take("*") or self._take("+")):
            self._take("?")
        repeat = self.text[start : self.at]
        if repeat:
            self._take("?")  # how much of the string it takes first does not change which strings there are
        return repeat

    def _class(self) -> str:
        negated = self._take("^")
        ranges: Ranges = []
        while not self._take("]"):
            low = self._member()
            if self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self._member()
                if len(low) > 1 or len(high) > 1 or low[0][0] > high[0][1] or low[0][0] < low[0][1]:
                    raise self._refused("a range without order")
                low = [(low[0][0], high[0][1])]
            ranges += low
        return _set(_complement(ranges) if negated else ranges) or self._nothing()

    def _member(self) -> Ranges:
        char = self._next()
        return self._escape(inside=True) if char == "\\" else [(ord(char), ord(char))]

    def _escape(self, inside: bool = False) -> Ranges:
        char = self._next()
        if char.lower() in CLASSES:
            return CLASSES[char] if char in CLASSES else _complement(CLASSES[char.lower()])
        if char in CONTROLS or (inside and char == "b"):
            code = CONTROLS.get(char, 8)
        elif char in "xu":
            braces = char == "u" and self._take("{")
            digits = self.text[
                self.at : self.text.find("}", self.at) if braces else self.at + (2 if char == "x" else 4)
            ]
            try:
                code = int(digits, 16)
            except ValueError:
                raise self._refused(f"\\{char} without its digits") from None
            self.at += len(digits) + braces
        elif char.isalnum():
            raise self._refused(f"\\{char}")
        else:
            code = ord(char)
        return [(code, code)]

    def _nothing(self) -> str:
        raise self._refused("a class of characters that JSON strings do not hold as they are")

    def _next(self) -> str:
        if self.at == len(self.text):
            raise self._refused("an end in the middle")
        self.at += 1
        return self.text[self.at - 1]

    def _take(self, char: str) -> bool:
        found = self.text.startswith(char, self.at)
        self.at += found
        return found

    def _refused(self, what: str) -> ValueError:
        return ValueError(f"pattern {self.text!r:.80} has {what} at {self.at}; that cannot be enforced")


def _complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    found, free = [], 0
    for low, high in sorted(ranges):
        if low > free:
            found.append((free, low - 1))
        free = max(free, high + 1)
    return [*found, (free, LAST)] if free <= LAST else found


def _set(ranges: Ranges) -> str:
    """A class of these characters but those that JSON escapes; empty where none is left.

    A class for each length in UTF-8: XGrammar lets bytes through that are no character where one spans several lengths.
    """
    kept = _complement([*_complement(ranges), *ESCAPED])
    classes = []
    for first, last in LENGTHS:
        inside = [(max(low, first), min(high, last)) for low, high in kept if low <= last and high >= first]
        spelled = (_code(low) if low == high else f"{_code(low)}-{_code(high)}" for low, high in inside)
        classes += [f"[{''.join(spelled)}]"] if inside else []
    return f"(?:{'|'.join(classes)})" if len(classes) > 1 else "".join(classes)


def _literal(code: int) -> str:
    if code in JSON_ESCAPES:
        return f"(?:{JSON_ESCAPES[code]})"
    return f"(?:\\\\u{code:04x})" if code < 32 else _code(code)


def _code(code: int) -> str:
    char = chr(code)
    return char if char.isalnum() and char.isascii() else f"\\x{code:02x}" if code < 256 else f"\\u{{{code:x}}}"
