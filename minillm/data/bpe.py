"""Byte-pair encoding on bytes: text to token ids and back, learnt from text.

Idea:        Start from the 256 bytes, so that every text can be encoded. Cut the text into words, count neighbouring
             tokens inside words, make the most frequent pair one new token, and repeat until the vocabulary is full. To
             encode a word, apply the same merges in the order in which they were learnt.
Cost:        Training: count once; then a merge rewrites only the distinct words that hold its pair, and a heap whose
             counts are refreshed when they reach the top names the next pair. Counting again for every merge would cost
             merges x distinct words. Encoding: O(n log n) for a word of n bytes, once; then a look-up.
Paper:       Sennrich, Haddow, Birch 2016, arXiv:1508.07909, algorithm 1. Bytes, and words cut by a pattern: Radford et
             al. 2019 (the GPT-2 report), section 2.2.
Production:  the `tokenizers` library with a byte-level pre-tokenizer: the same merges in the same order, the same ids,
             and each reads the other's tokenizer.json.
Leaves out:  dropout of merges; a template that adds a beginning-of-text id; several patterns one after the other.
"""

import codecs
import heapq
import json
import operator
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import regex

# How text is cut into words: a space belongs to the word after it, and no merge crosses a cut.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")  # every digit is a word

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # end of a document; start and end of a chat message
ROLES = ("system", "user", "assistant", "tool")
CACHED_WORDS, CACHED_LENGTH = 2**18, 64

# Tokens are spelled as in tokenizer.json: one visible character a byte, printable Latin-1 as itself, then U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
CHARACTER = {byte: chr(byte) for byte in VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}
BYTE = {character: byte for byte, character in CHARACTER.items()}


def spell(data: bytes) -> str:
    """The bytes in visible characters.

    >>> spell(" café".encode())
    'ĠcafÃ©'
    """
    return data.decode("latin-1").translate(CHARACTER)


def join_pair(word: str, pair: str, new: str) -> tuple[str, list[str], list[str]]:
    """The word, one character a token, with the pair made one token; neighbouring pairs that this ends and begins.

    >>> join_pair("lowest", "ow", "X")
    ('lXest', ['lo', 'we'], ['lX', 'Xe'])
    """
    ended, begun = [], []
    at = word.find(pair)
    while at >= 0:
        if at:
            ended.append(word[at - 1] + pair[0])
            begun.append(word[at - 1] + new)
        word = word[:at] + new + word[at + 2 :]
        if at + 1 < len(word):
            ended.append(pair[1] + word[at + 1])
            begun.append(new + word[at + 1])
        at = word.find(pair, at + 1)
    return word, ended, begun


def learn_merges(words: Mapping[str, int], count: int) -> list[tuple[str, str]]:
    """The merges that make `count` new tokens (fewer when no pair is left), from spelled words and their frequencies.

    A new token is the next free character. Of equally frequent pairs the smaller string wins: the older tokens.

    >>> learn_merges({"low": 5, "lower": 2, "newer": 6}, 3)
    [('e', 'r'), ('w', 'er'), ('l', 'o')]
    """
    text, times = list(words), list(words.values())
    spelling = {character: character for character in BYTE}
    pairs: defaultdict[str, int] = defaultdict(int)
    places: defaultdict[str, list[int]] = defaultdict(list)  # the words that hold a pair
    for i, word in enumerate(text):
        for pair in map(operator.add, word, word[1:]):
            pairs[pair] += times[i]
            places[pair].append(i)
    heap = [(-pairs[pair], pair, found) for pair, found in places.items()]
    heapq.heapify(heap)
    merges: list[tuple[str, str]] = []
    while heap and len(merges) < count:
        minus, pair, found = heap[0]
        if pairs[pair] != -minus:  # other merges took some of them since this count
            heapq.heapreplace(heap, (-pairs[pair], pair, found))
            continue
        if minus == 0:
            break
        heapq.heappop(heap)
        left, right = (spelling[character] for character in tuple(pair))
        merges.append((left, right))
        new = chr(256 + len(HIDDEN) + len(merges))
        spelling[new] = left + right
        places = defaultdict(list)
        for i in found:
            text[i], ended, begun = join_pair(text[i], pair, new)
            for side in ended:
                pairs[side] -= times[i]
            for side in begun:
                pairs[side] += times[i]
                places[side].append(i)
        for pair, found in places.items():
            heapq.heappush(heap, (-pairs[pair], pair, found))
    return merges


def merge_word(word: Sequence[int], ranks: Mapping[tuple[int, int], tuple[int, int]]) -> list[int]:
    """The ids after all merges, the one learnt first before the others; `ranks`: pair of ids to (rank, new id).

    >>> merge_word([1, 2, 1, 2, 3], {(1, 2): (0, 9), (2, 3): (1, 8)})
    [9, 9, 3]
    """
    ids, n = list(word), len(word)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))  # neighbours among the tokens still there
    heap: list[tuple[int, int, tuple[int, int], int]] = []
    fresh: Iterable[int] = range(n)  # places where a pair may begin that the heap does not hold
    while True:
        for i in fresh:
            if i >= 0 and after[i] < n and (found := ranks.get(pair := (ids[i], ids[after[i]]))):
                heapq.heappush(heap, (found[0], i, pair, found[1]))
        if not heap:
            return [i for i in ids if i >= 0]
        _, i, pair, new = heapq.heappop(heap)
        j, fresh = after[i], ()
        if j < n and pair == (ids[i], ids[j]):  # else one of the two is part of another token by now
            ids[i], ids[j], after[i] = new, -1, after[j]
            if after[j] < n:
                before[after[j]] = i
            fresh = (before[i], i)


class Tokenizer:
    """Text to ids and back, from spelled tokens with their ids, merges in order, and special tokens.

    `normalize` is a Unicode form that text is brought to first ("NFC" in Qwen's files); with `whole_words` a word that
    is a token is not merged from bytes (Llama 3).
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        special: Mapping[str, int] | None = None,
        pattern: str = GPT2,
        normalize: str | None = None,
        whole_words: bool = False,
    ) -> None:
        self.vocabulary, self.merges, self.special = dict(vocabulary), list(merges), dict(special or {})
        self.pattern, self.normalize, self.whole_words = pattern, normalize, whole_words
        needed = chain(BYTE, *((left, right, left + right) for left, right in merges))
        if (lacking := next((token for token in needed if token not in vocabulary), None)) is not None:
            raise ValueError(f"the vocabulary must hold all bytes and merges, {lacking!r} is missing")
        if (odd := next((token for token in vocabulary if not BYTE.keys() >= set(token)), None)) is not None:
            raise ValueError(f"the token {odd!r} holds a character that stands for no byte")
        if clash := vocabulary.keys() & self.special.keys():
            raise ValueError(f"a special token must not be an ordinary one as well, got {min(clash)!r}")
        self.bytes_of = {i: bytes(BYTE[character] for character in token) for token, i in vocabulary.items()}
        self.bytes_of |= {i: name.encode() for name, i in self.special.items()}
        if len(self.bytes_of) < len(vocabulary) + len(self.special):
            raise ValueError("every token needs an id of its own, two have the same")
        self._ranks = {
            (vocabulary[left], vocabulary[right]): (rank, vocabulary[left + right])
            for rank, (left, right) in enumerate(merges)
        }
        self._byte_ids = [vocabulary[CHARACTER[byte]] for byte in range(256)]
        self._words = _word_pattern(pattern)
        self._cache = _Cache(self._encode_word)

    @property
    def size(self) -> int:
        """One more than the largest id: the rows that an embedding needs."""
        return max(self.bytes_of) + 1

    def encode(self, text: str | bytes, *, allowed: Collection[str] = ()) -> list[int]:
        """The ids of the text. A special token written in it is plain characters unless `allowed` names it.

        So text from outside cannot forge the end of a message. Bytes need not be UTF-8.
        """
        if unknown := [name for name in allowed if name not in self.special]:
            raise ValueError(f"allowed must name special tokens of {list(self.special)}, got {unknown[0]!r}")
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        if not allowed:
            return self._encode_plain(text)
        ids: list[int] = []
        for part in _any_of(allowed).split(text):
            ids += [self.special[part]] if part in allowed else self._encode_plain(part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        if self.normalize:
            text = unicodedata.normalize(self.normalize, text)  # type: ignore[arg-type]
        return list(chain.from_iterable(map(self._cache.__getitem__, self._words.findall(text))))

    def _encode_word(self, word: str) -> list[int]:
        data = word.encode("utf-8", "surrogateescape")
        if self.whole_words and (token := spell(data)) in self.vocabulary:
            return [self.vocabulary[token]]
        return merge_word([self._byte_ids[byte] for byte in data], self._ranks)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, a special token as its name. ValueError: an id that no token has."""
        try:
            return b"".join(map(self.bytes_of.__getitem__, ids))
        except KeyError as missing:
            raise ValueError(f"ids must be of the vocabulary, 0 to {self.size - 1}, got {missing}") from None

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of the ids, with U+FFFD for bytes that are not UTF-8, such as the half of a character."""
        if skip_special:
            hidden = set(self.special.values())
            ids = [i for i in ids if i not in hidden]
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of the ids as they come, in pieces of whole characters; the pieces join to `decode(ids)`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            if piece := decoder.decode(self.decode_bytes([i])):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json in which every special token is marked as such."""
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        options = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
        options |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": self.whole_words}
        vocabulary = dict(sorted((self.vocabulary | self.special).items(), key=operator.itemgetter(1)))
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": name, **flags} for name, i in self.special.items()],
            "normalizer": {"type": self.normalize} if self.normalize else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "post_processor": None,
            "decoder": level,
            "model": {
                "type": "BPE",
                **options,
                "vocab": vocabulary,
                "merges": [" ".join(pair) for pair in self.merges],
            },
        }
        Path(path).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8", newline="\n")


def train(texts: Iterable[str], size: int, *, pattern: str = GPT2, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """A tokenizer of `size` ids: the special tokens, the 256 bytes, then merges (fewer when no pair is left to merge).

    A special token written in a text ends a word and is not learnt from.

    >>> train(["low lower lowest"], 262).merges
    [('l', 'o'), ('lo', 'w'), ('Ġ', 'low')]
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a list of texts, got one string")
    count = size - len(BYTE) - len(special)
    if count < 0:
        raise ValueError(f"size must hold 256 bytes and {len(special)} special tokens, got {size}")
    words, cut, written = Counter[str](), _word_pattern(pattern), _any_of(special)
    for text in texts:
        for part in written.split(text):
            if part not in special:
                words.update(cut.findall(part))
    merges = learn_merges({spell(word.encode()): times for word, times in words.items()}, count)
    vocabulary = {token: i for i, token in enumerate(chain(BYTE, map("".join, merges)), start=len(special))}
    return Tokenizer(vocabulary, merges, special={name: i for i, name in enumerate(special)}, pattern=pattern)


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json that is byte-level BPE with one pattern. ValueError: what it is instead.

    Its template is not applied: `encode` equals that of `tokenizers` with add_special_tokens=False.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        model, added, normalizer = content["model"], content["added_tokens"], content["normalizer"]
        if odd := [token for token, i in model["vocab"].items() if type(i) is not int or i < 0]:
            raise ValueError(f"the id of {odd[0]!r} is {model['vocab'][odd[0]]!r}")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model["type"] != "BPE" or model.get(option):
                raise ValueError(f"the model is {model['type']} with {option} {model.get(option)}")
        if normalizer and normalizer["type"] != "NFC":
            raise ValueError(f"the normalizer is {normalizer}")
        for token in added:
            if token["lstrip"] or token["rstrip"] or token["single_word"]:
                raise ValueError(f"the special token {token['content']!r} takes spaces or whole words")
            if model["vocab"].pop(token["content"], token["id"]) != token["id"]:
                raise ValueError(f"the special token {token['content']!r} has two ids")
        return Tokenizer(
            model["vocab"],
            [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]],
            special={token["content"]: token["id"] for token in added},
            pattern=_pattern_of(content["pre_tokenizer"]),
            normalize=normalizer and normalizer["type"],
            whole_words=model.get("ignore_merges", False),
        )
    except KeyError as missing:
        raise ValueError(f"{path} is no tokenizer of byte-level BPE: it lacks {missing}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no tokenizer of byte-level BPE: {error}") from None


def _pattern_of(step: dict[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False} if step.get("use_regex", True):
            return GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    raise ValueError(f"the pre-tokenizer is not one pattern before bytes: {step}")


def _word_pattern(pattern: str) -> regex.Pattern[str]:
    """Finds every word; what lies between two matches of the pattern is a word too, so that nothing is lost."""
    try:
        words = regex.compile(f"{pattern}|(?:(?!{pattern})[\\s\\S])+")
    except regex.error as error:
        raise ValueError(f"the pattern must be a regular expression, got {pattern!r}: {error}") from None
    if words.groups:
        raise ValueError(f"the pattern must not capture, use (?:...), got {pattern!r}")
    return words


def _any_of(names: Collection[str]) -> regex.Pattern[str]:
    """Splits at any of the names and keeps them; of two that begin alike the longer one is seen."""
    longest_first = sorted(names, key=len, reverse=True)
    return regex.compile(f"({'|'.join(map(regex.escape, longest_first)) or '(?!)'})")


class _Cache(dict[str, list[int]]):
    """The ids of words seen before, short ones and a bounded number."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self.encode = encode

    def __missing__(self, word: str) -> list[int]:
        ids = self.encode(word)
        if len(word) <= CACHED_LENGTH and len(self) < CACHED_WORDS:
            self[word] = ids
        return ids


class Chat(NamedTuple):
    """A conversation as ids."""

    ids: list[int]
    spans: list[tuple[int, int]]  # start and end in ids of each text by the assistant with its end of message


def render_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, reply: bool = False) -> Chat:
    """Messages {"role", "content"} in the ChatML template, built from ids: no content can open or close a message.

    `reply` appends the start of the assistant's next message. Ids of earlier messages never change with later ones.

    >>> tokenizer = train(["hello"], 259)
    >>> chat = render_chat(tokenizer, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}])
    >>> [tokenizer.decode(chat.ids[start:end]) for start, end in chat.spans]
    ['yes<|im_end|>']
    """
    if not tokenizer.special.keys() >= set(SPECIAL[1:]):
        raise ValueError(f"the template needs the special tokens {SPECIAL[1:]}, got {tuple(tokenizer.special)}")
    opened, closed = (tokenizer.special[name] for name in SPECIAL[1:])
    ids: list[int] = []
    spans = []
    for number, message in enumerate(messages):
        check_message(number, message)
        ids += [opened, *tokenizer.encode(message["role"] + "\n")]
        start = len(ids)
        ids += [*tokenizer.encode(message["content"]), closed]
        if message["role"] == "assistant":
            spans.append((start, len(ids)))
        ids += tokenizer.encode("\n")
    if reply:
        ids += [opened, *tokenizer.encode("assistant\n")]
    return Chat(ids, spans)


def check_message(number: int, message: Mapping[str, str]) -> None:
    """Refuse a message of a conversation that is none."""
    if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
        raise ValueError(f"a message needs a role of {ROLES} and a text, message {number} is {message}")
