package harness

import (
	"fmt"
	"os"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Settings reads the node's configuration file.
func (n *Node) Settings() (map[string]any, error) {
	b, err := os.ReadFile(n.Config)
	if err != nil {
		return nil, err
	}
	m := map[string]any{}
	if err := toml.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%s: %w", n.Config, err)
	}
	return m, nil
}

// Setting returns a field of the configuration file, named as in "device.uri".
func (n *Node) Setting(name string) (string, error) {
	m, err := n.Settings()
	if err != nil {
		return "", err
	}
	table, field, _ := strings.Cut(name, ".")
	t, _ := m[table].(map[string]any)
	v, ok := t[field].(string)
	if !ok {
		return "", fmt.Errorf("%s has no text %s", n.Config, name)
	}
	return v, nil
}

// Configure changes fields of the configuration file, named as in "device.uri";
// nil takes one out. The node reads them when it starts. restore writes the file
// back as it was.
func (n *Node) Configure(changes map[string]any) (restore func() error, err error) {
	before, err := os.ReadFile(n.Config)
	if err != nil {
		return nil, err
	}
	m, err := n.Settings()
	if err != nil {
		return nil, err
	}
	for name, value := range changes {
		table, field, ok := strings.Cut(name, ".")
		if !ok {
			return nil, fmt.Errorf("%q is not TABLE.FIELD", name)
		}
		t, ok := m[table].(map[string]any)
		if !ok {
			t = map[string]any{}
			m[table] = t
		}
		if value == nil {
			delete(t, field)
		} else {
			t[field] = value
		}
	}
	b, err := toml.Marshal(m)
	if err != nil {
		return nil, err
	}
	restore = func() error { return os.WriteFile(n.Config, before, 0o600) }
	return restore, os.WriteFile(n.Config, b, 0o600)
}
