"""One file a verb: what the recipe says, put in the words that each room takes."""
