"""``opacus-bpclip ab --study FILE``: many comparisons, tuned and repeated, from one small file.

A study is cells (data, model, privacy) times arms (ways to clip) times seeds. Each run is one line
of JSON; tables and plots are made of these lines.
"""
