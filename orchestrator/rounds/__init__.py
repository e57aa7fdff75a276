"""Rounds: plan, gather, reduce, refine, assess, commit. One step a file; `page.run_round` calls them."""
