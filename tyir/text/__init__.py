"""The text form: lexer, parsers and printers of MLIR's generic syntax and of tyir's short one."""
