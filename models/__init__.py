"""Everything the stages share: orders, layers, methods, sampling, the tokenizer, artifacts.

Shape suffixes, here and everywhere:

    N images      B batch          T raster position     S visiting step    V code (of the codebook)
    C code vector D width          H heads               K head width       R rotation pairs, K / 2
    L slots of a sequence          G grid side, T = G*G  h w grid or pixels m, n cells of one call
"""
