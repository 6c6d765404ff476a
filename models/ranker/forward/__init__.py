"""A lean forward pass over packed prompts for Llama-like models, used by fitting and inference, importing neither.

``shape`` says which models it computes, ``weights`` fuses theirs, ``batch`` packs prompts, ``model`` is the pass, and
``graphs`` runs it at fixed shapes, on a GPU as CUDA graphs.
"""
