"""Look-alikes of medical images, drawn from formulas: their masks are right by construction."""
