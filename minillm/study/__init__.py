"""The study app: questions, cards, checker, schedule, store, widgets. Nothing under `minillm` imports it."""
