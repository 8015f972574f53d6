"""Texts on which two tokenizers are compared: they must make the same tokens of each, and the same text of the tokens."""

from collections.abc import Iterable, Iterator

LANGUAGES = (
    "The quick brown fox jumps over the lazy dog. It's what we'd call \"a pangram\", isn't it?",
    "Victor jagt zwölf Boxkämpfer quer über den großen Sylter Deich. Straße, Maß, ÄÖÜ.",
    "Portez ce vieux whisky au juge blond qui fume : « ça va ? » L'été, où êtes-vous, Noël ?",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia. ¿Qué? ¡Mañana, señor!",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň úpěl. Árvíztűrő tükörfúrógép. İstanbul ılık şöyle.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ґанок їжака.",
    "Ταχίστη αλώπηξ βαφής ψημένη γη, δρασκελίζει υπέρ νωθρού κυνός.",
    "敏捷的棕色狐狸跳过了懒狗。今天天气怎么样?我们去北京吧!繁體字也在這裡。",
    "いろはにほへと ちりぬるを。カタカナとひらがな、漢字が混ざる文章です。",
    "다람쥐 헌 쳇바퀴에 타고파. 안녕하세요, 무엇을 도와드릴까요?",
    "صِف خَلقَ خَودٍ كَمِثلِ الشَمسِ إِذ بَزَغَت. مرحبا بالعالم ٣٤٥",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה. שָׁלוֹם",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश। १२३",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "Ελλάδα, Việt Nam, Türkiye, Österreich, Україна, საქართველო, አማርኛ, বাংলা, தமிழ்",
)
WRITING = (
    'def f(x: int) -> dict[str, int]:\n    """Doc."""\n    return {\'a\': [x, 0x1F], "b": None}  # tab\there\r\n',
    "for (let i = 0; i < n; ++i) { console.log(`${i}: ${a[i] ?? 'none'}`); } // done",
    '#include <stdio.h>\nint main(void) {\n\tprintf("%d\\n", 1 << 3 & ~0);\n\treturn 0;\n}\n',
    "SELECT * FROM users WHERE id = %s AND name LIKE '%x_y%' ORDER BY 1 DESC; -- 2023 2024",
    '<html><body class="a b"><p>Hi &amp; bye<br/></p></body></html>',
    '{"key": [1, 2.5, -3e-7, true, null], "text": "a\\u00e9\\n"}',
    "$ curl -sS https://example.org/a/b?c=d&e=%20f#g | grep -E '^[a-z]+@[a-z.]+$' > /dev/null 2>&1",
    "user.name+tag@example.com, C:\\Windows\\System32, ~/.config/x, file_name-v1.2.3.tar.gz",
    "0 1 12 123 1234 12345 123456 1,234,567.89 3.14159 1e10 0b1010 2024-12-31T23:59:59Z 50% $9.99 €5 №7 ½ ² Ⅳ",
    "What is 2 plus 2? hello hello Hello HELLO heLLo hElLO",
    "Pneumonoultramicroscopicsilicovolcanoconiosis Donaudampfschifffahrtsgesellschaftskapitän antidisestablishmentarianism",
    "camelCaseName snake_case_name SCREAMING_CASE kebab-case-name PascalCase x1y2z3 I'm you're they've he'll she'd DON'T",
    "# Title\n\n* one\n* two\n  1. three\n\n> quote\n\n| a | b |\n|---|---|\n\n---\n\n**bold** _it_ `code` ~~gone~~",
    "$\\int_0^1 x^2\\,dx = \\frac{1}{3}$ and ∑ ∏ √ ∞ ≠ ≤ → ∀ ∃ ∈ ℝ α β γ",
    "a . b , c ! d ? e ' f ' don 't do n't I 'm we 've , end .",
    'a[i] = b[0][j] + x[N]; f"{x} {name} {{y}}"; List<int> v; Map<String, T> m; <div> <b> <name> [urgent] [TODO] [1] [x] [ ]',
)
CHARACTERS = (
    "",
    " ",
    "  ",
    " leading and trailing ",
    "a  b   c    d     e        f                g",
    "\n",
    "\n\n\n\nline\n\n  indented\n\t\ttabs\t\n \n",
    "\r\n\r\n\x0b\x0c",
    "no\u00a0break\u2003em\u3000wide\u200bzero\u200cnon\u200djoiner\u2060word\ufeffmark\u00adsoft",
    "🙂 😀😃 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️ ☺︎ 1️⃣",
    "e\u0301 é ñ n\u0303 a\u030a\u0323 ﬁ ﬂ Å Å ① ㍿ ｆｕｌｌｗｉｄｔｈ Ａ１ ﷺ Z̷̢͍a̵̛l̶g̴o̸",
    "'‘’‚‛\"“”„‟ -–—―‐ … · • ° § ¶ © ® ™ ± × ÷ ¿ ¡ « » ‹ ›",
    "\x00\x01\x07\x1b[31m\x7f\x80\x9f",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 𐍈 𠜎 \U0001f9ec \ufffd",
    "аdmin раypal gооgle",
    "!!!! ???? .... ,,,, ---- ____ ==== #### **** //// \\\\\\\\ ((())) [[[]]] {{{}}} <<<>>>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)
CHAT = (
    "### Instruction:\nSay |prod| twice   with  spaces.\n\n### Response:\n",
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n<eos>",
    '<|user|>\nHi<|end|>\n<|assistant|>\n<think>\nhm\n</think>\n<tool_call>{"name": "f"}</tool_call><|endoftext|>',
    "[CLS] one [SEP] two [MASK] [PAD] [UNK] <unk> <pad> <mask> <extra_id_0> <0x0A> ▁ Ġ Ċ ##ing",
    "USER: Hi\nASSISTANT: Hello.</s>Human: a\n\nAssistant: b",
)
LONG = " ".join(f"{number} {LANGUAGES[number % 5][:40]}" for number in range(120))
TEXTS = (*LANGUAGES, *WRITING, *CHARACTERS, *CHAT, LONG)
"""The fixed texts. Those around added tokens and around what differs between two tokenizers come in addition."""


def around(tokens: Iterable[str]) -> Iterator[str]:
    """Texts that hold each of these tokens alone, between words, between spaces, and twice."""
    for token in tokens:
        yield from (token, f"say {token} now", f"x{token}y", f"a  {token}  {token}\n{token}")


def spread(items: list[str], most: int) -> list[str]:
    """At most `most` of the items, evenly from the whole list."""
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]
