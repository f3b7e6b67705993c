"""Writes small valid answers/ trees for tests."""

from pathlib import Path

FRONT = """---
question: {en: "Why is EN faster?", zh: "为什么 ZH 更快？"}
order: 1
level: core
minutes: 30
aliases: [tiling, online softmax]
seeds: [A1, B11]
modules: [attention/flash]
---
"""

EN = """
## Short answer

It never writes the score matrix.

## Full answer

1. **It is exact.** The result is the same
   to rounding [notebook](../../notebooks/attention/flash.ipynb#equal)
2. **Blocks stay in fast memory.** A list inside an item:
   - reads each key once [paper, section 3.1](https://arxiv.org/abs/2205.14135).

## Say the numbers

The score matrix of 4,096 tokens in float16 takes 32 MiB:

```python
>>> 4096 * 4096 * 2 // 2**20
32
```

## Follow-ups

### What does the backward pass keep?

Output and log-sum-exp.

### Is it always faster?

Not for short sequences.

## Common wrong answers

- **"It is an approximation."** It is exact. [notebook](../../notebooks/attention/flash.ipynb#equal)

## Sources

- [FlashAttention](https://arxiv.org/abs/2205.14135)
"""

ZH = """## 简答

从不写出分数矩阵。

## 详答

1. **结果是精确的。** 只有舍入差别 [笔记本](../../notebooks/attention/flash.ipynb#equal)
2. **分块留在片上内存** 每个 key 只读一次（[论文 3.1 节](https://arxiv.org/abs/2205.14135)）。

## 数字

4,096 个 token 的 float16 分数矩阵占 32 MiB：

```python
>>> 4096 * 4096 * 2 // 2**20
32
```

## 追问

### 反向传播保留什么？

输出和 log-sum-exp。

### 总是更快吗？

短序列不一定。

## 常见错误

- **“它是近似算法。”** 它是精确的。[笔记本](../../notebooks/attention/flash.ipynb#equal)

## 出处

- [FlashAttention](https://arxiv.org/abs/2205.14135)
"""


def write_question(
    root: Path, id: str, *, order: int = 1, en: str = "Why is flash attention faster?", zh: str = "为什么更快？"
) -> Path:
    """A valid question under root/answers, with its module; the path of the English file."""
    front = FRONT.replace("Why is EN faster?", en).replace("为什么 ZH 更快？", zh)
    front = front.replace("order: 1", f"order: {order}").replace("attention/flash", id)
    path = root / "answers" / f"{id}.md"
    module = root / "minillm" / f"{id}.py"
    for folder in (path.parent, module.parent):
        folder.mkdir(parents=True, exist_ok=True)
    path.write_text(front + EN, encoding="utf-8", newline="\n")
    path.with_suffix(".zh.md").write_text(ZH, encoding="utf-8", newline="\n")
    module.write_text('"""A module."""\n', encoding="utf-8")
    return path
