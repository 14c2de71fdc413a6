package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

// Config is the configuration file of a node. Paths are relative to the file.
type Config struct {
	Node    string `toml:"node"`
	Site    string `toml:"site"`
	DataDir string `toml:"data_dir"`
	Genesis string `toml:"genesis"`

	TLS     TLSConfig     `toml:"tls"`
	Cluster ClusterConfig `toml:"cluster"`
	API     APIConfig     `toml:"api"`
	Device  DeviceConfig  `toml:"device"`
	Cache   CacheConfig   `toml:"cache"`
	Log     LogConfig     `toml:"log"`
	Audit   AuditConfig   `toml:"audit"`
	Notify  NotifyConfig  `toml:"notify"`

	Anomaly *AnomalyConfig `toml:"anomaly"` // nil: the node does not look for any

	NextDevice *DeviceConfig `toml:"next_device"` // that takes the place of the device; see conclaved rekey
}

// TLSConfig names the node's certificate (URI SAN spiffe://TRUST-DOMAIN/node/NODE,
// issued by the site's CA) and its key, PEM.
type TLSConfig struct {
	Certificate string `toml:"certificate"`
	Key         string `toml:"key"`
}

// ClusterConfig is where other nodes connect.
type ClusterConfig struct {
	Listen    string `toml:"listen"`
	Advertise string `toml:"advertise"` // host:port put into the node card; default: listen

	Profile           string   `toml:"profile"`            // auto (default), lan, wan: the timing, by the round trips between the nodes
	Heartbeat         Duration `toml:"heartbeat"`          // a dead leader is replaced within three of these; in place of profile
	PreferSites       []string `toml:"prefer_sites"`       // at which the leader should be, the best first; default: anywhere
	SnapshotThreshold uint64   `toml:"snapshot_threshold"` // log entries between snapshots; default 8192
}

// timing is what the configuration says of it; the rest follows from heartbeat or the profile.
func (c ClusterConfig) timing() cluster.Timing {
	return cluster.Timing{Heartbeat: c.Heartbeat.Duration, SnapshotThreshold: c.SnapshotThreshold}
}

func (c ClusterConfig) profile() cluster.Profile {
	if c.Profile == "" {
		return cluster.Auto
	}
	return cluster.Profile(c.Profile)
}

// check returns the first field that is wrong and why.
func (c ClusterConfig) check() (field, why string) {
	if _, err := cluster.ParseProfile(string(c.profile())); err != nil {
		return "cluster.profile", err.Error()
	}
	if c.Profile != "" && c.Heartbeat.Duration != 0 {
		return "cluster.heartbeat", "the profile sets it; leave out one of the two"
	}
	for _, site := range c.PreferSites {
		if err := kms.CheckName("site", site); err != nil {
			return "cluster.prefer_sites", err.Error()
		}
	}
	return "", ""
}

// APIConfig is where clients connect.
type APIConfig struct {
	Listen        string `toml:"listen"`
	Advertise     string `toml:"advertise"` // URL put into the node card; default: https://listen
	RequireHybrid bool   `toml:"require_hybrid"`
}

// CacheConfig bounds the opened key material in locked memory.
type CacheConfig struct {
	TTL  Duration `toml:"ttl"`
	KEKs int      `toml:"keks"`
	Keys int      `toml:"keys"`
}

// LogConfig is the node's own log on standard error.
type LogConfig struct {
	Level  string `toml:"level"`  // debug, info, warn, error
	Format string `toml:"format"` // text, json
}

// Duration is a time.Duration written as "10s", at least a millisecond. It is a
// struct because a number without a unit would be decoded into an integer type,
// as nanoseconds.
type Duration struct{ time.Duration }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil || v < time.Millisecond {
		return fmt.Errorf("%q is not a positive duration such as \"10s\"", b)
	}
	d.Duration = v
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// loadConfig reads and checks a configuration file. Errors name file, line and field.
func loadConfig(path string) (Config, error) {
	c := Config{
		Cache: CacheConfig{TTL: Duration{10 * time.Minute}, KEKs: 1024, Keys: 16384},
		Log:   LogConfig{Level: "info", Format: "text"},
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("configuration: %w", err)
	}
	dec := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return c, positioned(path, err)
	}
	devices := map[string]*DeviceConfig{"device": &c.Device}
	if c.NextDevice != nil {
		devices["next_device"] = c.NextDevice
	}
	for _, d := range devices {
		d.setDefaults()
	}
	if field, why := c.check(); field != "" {
		return c, fmt.Errorf("%s:%d: %s: %s", path, lineOf(b, field), field, why)
	}
	paths := []*string{&c.DataDir, &c.Genesis, &c.TLS.Certificate, &c.TLS.Key}
	for table, d := range devices {
		if d.PINFD != 0 {
			if d.pin, err = readDescriptor(d.PINFD); err != nil {
				return c, fmt.Errorf("%s:%d: %s.pin_fd: %w", path, lineOf(b, table+".pin_fd"), table, err)
			}
		}
		paths = append(paths, d.paths()...)
	}
	paths = append(append(paths, c.Audit.paths()...), c.Notify.paths()...)
	dir := filepath.Dir(path)
	for _, p := range paths {
		if *p != "" && !filepath.IsAbs(*p) && !strings.HasPrefix(*p, "fd:") {
			*p = filepath.Join(dir, *p)
		}
	}
	if c.Cluster.Advertise == "" {
		c.Cluster.Advertise = c.Cluster.Listen
	}
	if c.API.Advertise == "" {
		c.API.Advertise = "https://" + c.API.Listen
	}
	return c, nil
}

// maxPIN bounds a PIN in bytes.
const maxPIN = 256

// readDescriptor reads a PIN from an inherited descriptor to its end and closes it.
func readDescriptor(fd int) (*secret.Bytes, error) {
	if fd < 3 {
		return nil, fmt.Errorf("descriptor %d is not one above 2", fd)
	}
	f := os.NewFile(uintptr(fd), "pin")
	defer f.Close()
	buf := make([]byte, maxPIN+2)
	defer secret.Wipe(buf)
	n, err := io.ReadFull(f, buf)
	if err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, fmt.Errorf("descriptor %d cannot be read to an end within %d bytes: start conclaved with the PIN on it, as in: conclaved run %d<pinfile", fd, maxPIN, fd)
	}
	return secret.Copy(bytes.TrimRight(buf[:n], "\r\n"))
}

// check returns the first field that is wrong and why.
func (c *Config) check() (field, why string) {
	for _, f := range []struct{ name, value string }{{"node", c.Node}, {"site", c.Site}} {
		if err := kms.CheckName(f.name, f.value); err != nil {
			return f.name, err.Error()
		}
	}
	required := []struct{ name, value, what string }{
		{"data_dir", c.DataDir, "the directory for the node's state"},
		{"genesis", c.Genesis, "the signed genesis document"},
		{"tls.certificate", c.TLS.Certificate, "the node's certificate (PEM)"},
		{"tls.key", c.TLS.Key, "the key of the node's certificate (PEM)"},
		{"cluster.listen", c.Cluster.Listen, "host:port for other nodes"},
		{"api.listen", c.API.Listen, "host:port for clients"},
	}
	for _, r := range required {
		if r.value == "" {
			return r.name, "missing: " + r.what
		}
	}
	for _, l := range []struct{ section, listen, advertise string }{
		{"cluster", c.Cluster.Listen, c.Cluster.Advertise}, {"api", c.API.Listen, c.API.Advertise},
	} {
		host, _, err := net.SplitHostPort(l.listen)
		if err != nil {
			return l.section + ".listen", fmt.Sprintf("%q is not host:port", l.listen)
		}
		if ip := net.ParseIP(host); l.advertise == "" && (host == "" || ip != nil && ip.IsUnspecified()) {
			return l.section + ".listen", "it listens on every address, so advertise must say by which one others reach it"
		}
	}
	if field, why = c.Cluster.check(); field != "" {
		return field, why
	}
	if field, why = c.Audit.check(); field != "" {
		return field, why
	}
	if field, why = c.Notify.check(); field != "" {
		return field, why
	}
	if field, why = c.Anomaly.check(); field != "" {
		return field, why
	}
	if field, why = c.Device.check("device"); field != "" {
		return field, why
	}
	if c.NextDevice != nil {
		if field, why = c.NextDevice.check("next_device"); field != "" {
			return field, why
		}
		if c.Device.PINFD != 0 && c.Device.PINFD == c.NextDevice.PINFD {
			return "next_device.pin_fd", "it is the descriptor of device.pin_fd, which can be read once"
		}
	}
	if c.Cache.KEKs < 1 {
		return "cache.keks", "must be at least 1"
	}
	if c.Cache.Keys < 1 {
		return "cache.keys", "must be at least 1"
	}
	if _, err := logLevel(c.Log.Level); err != nil {
		return "log.level", err.Error()
	}
	if c.Log.Format != "text" && c.Log.Format != "json" {
		return "log.format", fmt.Sprintf("%q is not \"text\" or \"json\"", c.Log.Format)
	}
	return "", ""
}

// positioned turns a decoder's error into file:line:column: field: reason.
func positioned(path string, err error) error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) && len(strict.Errors) > 0 {
		first := strict.Errors[0]
		row, col := first.Position()
		return fmt.Errorf("%s:%d:%d: %s: no such field", path, row, col, strings.Join(first.Key(), "."))
	}
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		row, col := decode.Position()
		field := strings.Join(decode.Key(), ".")
		if field != "" {
			field += ": "
		}
		return fmt.Errorf("%s:%d:%d: %s%s", path, row, col, field, strings.TrimPrefix(decode.Error(), "toml: "))
	}
	return fmt.Errorf("%s: %w", path, err)
}

// lineOf returns the line of a dotted field in the file: of its key, else of its
// table, else 1. It asks the TOML parser, so that comments and strings that look
// like the field do not mislead.
func lineOf(b []byte, field string) int {
	table, best := "", 1
	var p unstable.Parser
	p.Reset(b)
	for p.NextExpression() {
		e := p.Expression()
		var parts []string
		offset := uint32(0)
		for it := e.Key(); it.Next(); {
			if len(parts) == 0 {
				offset = it.Node().Raw.Offset
			}
			parts = append(parts, string(it.Node().Data))
		}
		name := strings.Join(parts, ".")
		line := 1 + bytes.Count(b[:offset], []byte("\n"))
		switch e.Kind {
		case unstable.Table:
			table = name + "."
			if strings.HasPrefix(field, table) {
				best = line
			}
		case unstable.KeyValue:
			if table+name == field {
				return line
			}
		}
	}
	return best
}
