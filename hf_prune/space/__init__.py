"""A page on the Hub that answers with a pruned model and its dense one, side by side: a Gradio Space.

`app.py` is the page itself: it is copied into the Space, and imports nothing of this package.
May import: errors, config, model, saved, publish.
"""
