package main

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/notify"
	"github.com/conclave-kms/conclave/kms/secret"
)

// WebhookConfig says where notices of a kind go, in [notify.NAME].
type WebhookConfig struct {
	URL   string   `toml:"url"`
	Key   string   `toml:"key"`   // file of mode 0600 with the key that signs, whsec_...
	CA    string   `toml:"ca"`    // PEM file; default: the system's
	Kinds []string `toml:"kinds"` // default: all
}

// NotifyConfig holds the webhooks by name.
type NotifyConfig map[string]*WebhookConfig

// check returns the first field that is wrong and why.
func (c NotifyConfig) check() (field, why string) {
	for _, name := range slices.Sorted(maps.Keys(c)) {
		w, section := c[name], "notify."+name
		if err := kms.CheckName("webhook", name); err != nil {
			return section, err.Error()
		}
		if w.URL == "" {
			return section + ".url", "missing: where notices are posted"
		}
		if err := notify.ParseURL(w.URL); err != nil {
			return section + ".url", err.Error()
		}
		if w.Key == "" {
			return section + ".key", "missing: a file of mode 0600 with the key that signs"
		}
		if w.CA != "" && !strings.HasPrefix(w.URL, "https:") {
			return section + ".ca", "only an https:// URL has use for it"
		}
		for _, kind := range w.Kinds {
			if !slices.Contains(notify.Kinds(), kind) {
				return section + ".kinds", fmt.Sprintf("%q is not one of %s", kind, strings.Join(notify.Kinds(), ", "))
			}
		}
	}
	return "", ""
}

// paths are those of files, which are relative to the configuration.
func (c NotifyConfig) paths() (p []*string) {
	for _, w := range c {
		p = append(p, &w.Key, &w.CA)
	}
	return p
}

// webhooks reads what the configuration names.
func (c NotifyConfig) webhooks() (hooks []notify.Webhook, err error) {
	defer func() {
		if err != nil {
			for _, h := range hooks {
				for _, k := range h.Keys {
					k.Destroy()
				}
			}
			hooks = nil
		}
	}()
	for _, name := range slices.Sorted(maps.Keys(c)) {
		w, section := c[name], "notify."+name
		config, err := sinkTLS(section+".ca", w.CA)
		if err != nil {
			return hooks, err
		}
		keys, err := webhookKeys(w.Key)
		if err != nil {
			return hooks, fmt.Errorf("%s.key: %w", section, err)
		}
		hooks = append(hooks, notify.Webhook{Name: name, URL: w.URL, Keys: keys, TLS: config, Kinds: w.Kinds})
	}
	return hooks, nil
}

// maxWebhookKeys bounds a file of keys in bytes.
const maxWebhookKeys = 4096

func webhookKeys(path string) ([]*secret.Bytes, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("others can read or change %s: chmod 600 it", path)
	}
	if st.Size() > maxWebhookKeys {
		return nil, fmt.Errorf("%s has more than %d bytes", path, maxWebhookKeys)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(b)
	keys, err := notify.ParseKeys(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return keys, nil
}
