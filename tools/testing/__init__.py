"""pytest's plugin for `.ir` tests, which the installed package brings along."""
