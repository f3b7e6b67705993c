"""minillm: reference implementations of what LLM interviews ask, small enough to read and tested against production.

One folder an area, one module a topic, `minillm.study` the app around them. Axis letters, the same everywhere:

    b  batch                    h  query heads            t  query positions
    s  key positions            g  key/value heads        d  head size
    c  model width              f  hidden width           v  vocabulary
    n  tokens, in any layout    e  experts                k  experts chosen for a token
    p  positions
"""
