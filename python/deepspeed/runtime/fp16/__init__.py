"""Loss scaling, by the names under which files of the original keep it."""
