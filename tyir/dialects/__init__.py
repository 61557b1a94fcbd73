"""The dialects, one module each; an op is declared once (`tyir.opdef`) and everything else is derived."""
