"""What is said about the commands as a whole: which there are, other programs' names for their options, what they print as JSON."""  # noqa: E501
