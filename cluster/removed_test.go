package cluster

import (
	"slices"
	"testing"
)

// No node can tell another that it was removed but by a majority of the voters that it knows.
func TestFarewells(t *testing.T) {
	var f farewells
	voters := []string{"a", "b", "c", "d", "e"}
	if !f.add("a", "p") || f.add("a", "p") {
		t.Error("who says it for the first time is not known")
	}
	for _, peer := range []string{"b", "x", "y", "z"} {
		f.add(peer, "p")
	}
	if said := f.enough(voters); said != nil {
		t.Errorf("two of five voters and three strangers are enough: %v", said)
	}
	f.add("e", "p")
	if said := f.enough(voters); !slices.Equal(said, []string{"a", "b", "e"}) {
		t.Errorf("three of five: %v", said)
	}
	if f.enough(voters[:4]) != nil {
		t.Error("half of the voters are enough")
	}
	if f.enough(nil) != nil {
		t.Error("a node without voters has a majority")
	}
}
