"""``opacus-bpclip ab``: one model trained by several clipping methods on equal terms.

Every arm starts from the same weights, draws the same Poisson batches, adds noise by the same
multiplier and is charged by the same accountant; only the clipping differs.
"""
