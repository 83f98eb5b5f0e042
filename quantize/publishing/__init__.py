"""From a finished package to a repo on the Hub that holds it: push, deliver, and a catalogue of many."""
