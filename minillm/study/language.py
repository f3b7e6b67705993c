"""The two languages of the app: its words, dates and intervals."""

from datetime import datetime, timedelta
from typing import Any

LANGUAGES = (("English", "en"), ("中文", "zh"))

AREAS_ZH = {
    "attention": "注意力",
    "position": "位置编码",
    "architecture": "模型结构",
    "data": "数据",
    "training": "训练",
    "distributed": "分布式",
    "finetuning": "微调",
    "alignment": "对齐",
    "inference": "推理",
    "prompting": "提示词",
}

WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "start": "Start timer",
        "stop": "Stop timer",
        "aim": "short answer 0:30, full answer 3:00",
        "box": "Say it aloud, or type your answer here. It is saved as you type.",
        "reveal": "Show the answer",
        "restart": "Start over",
        "restart_hint": "Hide the answer, empty the box (what you wrote is kept in your history) and begin again",
        "short": "Short answer",
        "full": "Full answer",
        "tick": "Tick the points that you made",
        "made": "{made} of {all} made",
        "file": "Numbers, follow-ups and sources: {link}",
        "how": "How well did you know it?",
        "saved": "Saved. Next review {date} ({in_days}).",
        "last": "Last rating: {rating}, {at}. Next review {date} ({in_days}).",
        "never": "Not rated yet.",
        "again": "Rate again",
        "ratings": ("Again", "Hard", "Good", "Easy"),
        "meanings": ("I did not know it", "with gaps or a long pause", "complete", "complete, without thinking"),
        "minutes": "{n} min",
        "core": "core",
        "advanced": "advanced",
        "due": "Due today",
        "none_due": "Nothing is due today.",
        "next_review": "Next review: {link}, {date} ({in_days}).",
        "first": "Nothing rated yet. Begin with {link}.",
        "next_new": "Next new question: {link}",
        "since": "since {date}",
        "progress": "Progress",
        "counts": "{seen} of {total} rated, {solved} solved, {due} due",
        "map": "Questions",
        "search": "Search: a word, a topic, an alias",
        "found": "{n} of {all} questions",
        "question": "question",
        "level": "level",
        "time": "time",
        "state": "state",
        "refresh": "Refresh",
        "as_of": "As of {date}. Run this cell (Shift+Enter) for the live page.",
        "states": {"due": "due", "solved": "solved", "seen": "seen", "new": "new"},
        "guess": "your guess",
        "compare": "Compare",
        "number": "Type a number first, such as 1500 or 1.5e3.",
        "ratio": "; your guess is {ratio} times that.",
    },
    "zh": {
        "start": "开始计时",
        "stop": "停止计时",
        "aim": "简答 0:30，详答 3:00",
        "box": "先说出来，或在这里写下你的答案。边写边保存。",
        "reveal": "查看答案",
        "restart": "重新作答",
        "restart_hint": "收起答案并清空输入框（写过的内容保留在历史记录里），从头再答",
        "short": "简答",
        "full": "详答",
        "tick": "勾选你答到的要点",
        "made": "答到 {made} / {all} 点",
        "file": "数字、追问与出处：{link}",
        "how": "掌握得怎么样？",
        "saved": "已保存。下次复习 {date}（{in_days}）。",
        "last": "上次评分：{rating}，{at}。下次复习 {date}（{in_days}）。",
        "never": "还没有评分。",
        "again": "再评一次",
        "ratings": ("忘了", "困难", "良好", "轻松"),
        "meanings": ("没答上来", "有遗漏或想了很久", "答全了", "不假思索就答全了"),
        "minutes": "{n} 分钟",
        "core": "核心",
        "advanced": "进阶",
        "due": "今天要复习",
        "none_due": "今天没有要复习的题目。",
        "next_review": "下一次复习：{link}，{date}（{in_days}）。",
        "first": "还没有评过分。从 {link} 开始吧。",
        "next_new": "下一道新题：{link}",
        "since": "{date} 到期",
        "progress": "进度",
        "counts": "已评分 {seen} / {total}，已通过 {solved}，待复习 {due}",
        "map": "题目",
        "search": "搜索：关键词、主题或别名",
        "found": "{n} / {all} 道题",
        "question": "题目",
        "level": "级别",
        "time": "时长",
        "state": "状态",
        "refresh": "刷新",
        "as_of": "截至 {date}。运行这个单元格（Shift+Enter）打开实时页面。",
        "states": {"due": "待复习", "solved": "已通过", "seen": "学过", "new": "未学"},
        "guess": "你的估计",
        "compare": "对比",
        "number": "请先输入一个数字，例如 1500 或 1.5e3。",
        "ratio": "；你的估计是它的 {ratio} 倍。",
    },
}


def span(interval: timedelta, language: str) -> str:
    """An interval in words, in whole days, months or years: "3 days", "2 months", "3 天"."""
    days = max(1, round(interval / timedelta(days=1)))
    number, unit = (days, 0) if days < 60 else (round(days / 30.4), 1) if days < 730 else (round(days / 365), 2)
    if language == "zh":
        return f"{number} {('天', '个月', '年')[unit]}"
    return f"{number} {('day', 'month', 'year')[unit]}{'' if number == 1 else 's'}"


def date(moment: datetime) -> str:
    """The local calendar date of an aware datetime, 2026-11-24."""
    return moment.astimezone().date().isoformat()


def in_days(moment: datetime, now: datetime, language: str) -> str:
    """How far `moment` is from `now` in local calendar days: "today", "in 3 days", "2 days ago"."""
    days = (moment.astimezone().date() - now.astimezone().date()).days
    if days == 0:
        return "今天" if language == "zh" else "today"
    distance = span(timedelta(days=abs(days)), language)
    if language == "zh":
        return f"{distance}{'后' if days > 0 else '前'}"
    return f"in {distance}" if days > 0 else f"{distance} ago"


def area_name(area: str, language: str) -> str:
    """The name of an area for the reader."""
    return AREAS_ZH[area] if language == "zh" else area
