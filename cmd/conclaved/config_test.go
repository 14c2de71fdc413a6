package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// goodConfig is complete and as short as it can be; line numbers count from 1.
const goodConfig = `node     = "fr-1"
site     = "fr"
data_dir = "data"
genesis  = "/etc/conclave/genesis.cbor"

[tls]
certificate = "node.crt"
key         = "node.key"

[cluster]
listen = "127.0.0.1:7600"

[api]
listen = "127.0.0.1:7700"

[device]
type = "pkcs11"
uri  = "pkcs11:token=x?module-path=/lib/x.so&pin-source=file:/pin"
`

func writeConfigFile(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "conclaved.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfigDefaults(t *testing.T) {
	path := writeConfigFile(t, goodConfig)
	c, err := loadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(path)
	for _, x := range []struct{ what, got, want string }{
		{"data_dir", c.DataDir, filepath.Join(dir, "data")},
		{"genesis", c.Genesis, "/etc/conclave/genesis.cbor"},
		{"tls.certificate", c.TLS.Certificate, filepath.Join(dir, "node.crt")},
		{"tls.key", c.TLS.Key, filepath.Join(dir, "node.key")},
		{"softhsm_conf", c.Device.SoftHSMConf, ""},
		{"cluster.advertise", c.Cluster.Advertise, "127.0.0.1:7600"},
		{"api.advertise", c.API.Advertise, "https://127.0.0.1:7700"},
		{"device.curve", c.Device.Curve, "P-384"},
		{"device.call_timeout", c.Device.CallTimeout.String(), "10s"},
		{"cache.ttl", c.Cache.TTL.String(), "10m0s"},
		{"cache.keks, keys", fmt.Sprint(c.Cache.KEKs, c.Cache.Keys), "1024 16384"},
		{"log", c.Log.Level + " " + c.Log.Format, "info text"},
		{"require_hybrid", fmt.Sprint(c.API.RequireHybrid), "false"},
		{"heartbeat", fmt.Sprint(c.Cluster.timing().Heartbeat), "0s"}, // the profile's
		{"profile", string(c.Cluster.profile()), "auto"},
	} {
		if x.got != x.want {
			t.Errorf("%s is %q, want %q", x.what, x.got, x.want)
		}
	}
	c, err = loadConfig(writeConfigFile(t, strings.Replace(goodConfig, "[api]", "heartbeat = \"3s\"\n[api]", 1)))
	if tm := c.Cluster.timing(); err != nil || tm.Heartbeat != 3*time.Second {
		t.Errorf("%+v, %v", tm, err)
	}
}

func TestConfigErrors(t *testing.T) {
	for _, x := range []struct{ name, old, new, want string }{
		{"unknown field", `listen = "127.0.0.1:7700"`, "listen = \"127.0.0.1:7700\"\nhybrid = true", ":15:1: api.hybrid: no such field"},
		{"unknown field at the top", "\n[tls]", "\n  nodes = 3\n[tls]", ":6:3: nodes: no such field"},
		{"unknown table", "[device]", "[devices]", ":16:2: devices: no such field"},
		{"wrong type", `node     = "fr-1"`, `node     = 1`, ":1:12: node: "},
		{"wrong type in a table", "[api]", "[cache]\nkeys = \"many\"\n[api]", ":14:8: cache.keys: "},
		{"not TOML", `site     = "fr"`, `site     = fr`, ":2:12: "},
		{"duration without a unit", "[api]", "[cache]\nttl = \"10\"\n[api]", `:14:7: cache.ttl: "10" is not a positive duration such as "10s"`},
		{"negative duration", "[api]", "[cache]\nttl = \"-1s\"\n[api]", "is not a positive duration"},
		{"duration as a number", "[api]", "[cache]\nttl = 10\n[api]", `"10" is not a positive duration`},
		{"node missing", `node     = "fr-1"`, "", ":1: node: node is missing"},
		{"node's name", `"fr-1"`, `"FR 1"`, ":1: node: "},
		{"data_dir missing", `data_dir = "data"`, "", ":1: data_dir: missing: "},
		{"certificate missing", `certificate = "node.crt"`, "", ":6: tls.certificate: missing: "},
		{"certificate empty", `"node.crt"`, `""`, ":7: tls.certificate: missing: "},
		{"table missing", "[cluster]\nlisten = \"127.0.0.1:7600\"", "", ":1: cluster.listen: missing: "},
		{"device type", `type = "pkcs11"`, `type = "yubikey"`, `:17: device.type: "yubikey" is not "pkcs11" or "tpm"`},
		{"device type missing", `type = "pkcs11"`, "", ":16: device.type: missing: "},
		{"uri missing", "uri ", "#uri ", ":16: device.uri: missing: "},
		{"unknown profile", "[api]", "profile = \"moon\"\n[api]", ":13: cluster.profile: profile \"moon\" is none of lan, wan, auto"},
		{"profile and heartbeat", "[api]", "profile = \"wan\"\nheartbeat = \"1s\"\n[api]", ":14: cluster.heartbeat: the profile sets it"},
		{"preferred site", "[api]", "prefer_sites = [\"F R\"]\n[api]", ":13: cluster.prefer_sites: "},
		{"uri and uris", "uri ", "uris = [\"pkcs11:token=a\", \"pkcs11:token=b\"]\nuri ", ":18: device.uris: there is uri too"},
		{"uris of one", "uri ", "uris = [\"pkcs11:token=a\"]\n#uri ", ":18: device.uris: 1 members make no group"},
		{"uris of none", "uri ", "uris = []\n#uri ", ":18: device.uris: 0 members make no group"},
		{"uris that are none", "uri ", "uris = [\"pkcs11:token=a\", \"b\"]\n#uri ", ":18: device.uris: member 2 is not a PKCS#11 URI"},
		{"the same uris", "uri ", "uris = [\"pkcs11:token=a\", \"pkcs11:token=a\"]\n#uri ", ":18: device.uris: members 1 and 2 are the same"},
		{"uris of a wrong type", "uri ", "uris = \"pkcs11:token=a\"\n#uri ", ":18:8: device.uris: "},
		{"softhsm_confs", "uri ", "softhsm_confs = [\"a\"]\nuri ", ":18: device.softhsm_confs: 1 files for 0 members"},
		{"isolate", "uri ", "isolate = \"yes\"\nuri ", ":18:11: device.isolate: "},
		{"field of a TPM", "uri ", "path = \"/dev/tpmrm0\"\nuri ", ":18: device.path: it is for type \"tpm\" only"},
		{"field of PKCS#11", "type = \"pkcs11\"\nuri ", "type = \"tpm\"\npath = \"a\"\nauth_file = \"b\"\nisolate = true\n#uri ", ":20: device.isolate: it is for type \"pkcs11\" only"},
		{"PCRs", "type = \"pkcs11\"\nuri ", "type = \"tpm\"\npath = \"a\"\nauth_file = \"b\"\npcrs = [7, 24]\n#uri ", ":20: device.pcrs: 24 is not a register"},
		{"no PCRs", "type = \"pkcs11\"\nuri ", "type = \"tpm\"\npath = \"a\"\nauth_file = \"b\"\npcrs = []\n#uri ", ":20: device.pcrs: an empty list"},
		{"next device", "[device]", "[next_device]\ntype = \"tpm\"\n[device]", ":16: next_device.path: missing: "},
		{"curve of the next device", "[device]", "[next_device]\ntype = \"tpm\"\npath = \"a\"\nauth_file = \"b\"\ncurve = \"P-1\"\n[device]", ":20: next_device.curve: "},
		{"one descriptor for two", "uri ", "pin_fd = 7\n[next_device]\npin_fd = 7\ntype = \"pkcs11\"\nuri = \"pkcs11:\"\n#", ":16: device.uri: missing"},
		{"path missing", `"pkcs11"`, `"tpm"`, ":16: device.path: missing: "},
		{"curve", "uri ", "curve = \"P-521\"\nuri ", `:18: device.curve: "P-521" is not`},
		{"cache", "[api]", "[cache]\nkeks = 0\n[api]", ":14: cache.keks: "},
		{"cache of keys", "[api]", "[cache]\nkeks = 1\nkeys = -1\n[api]", ":15: cache.keys: "},
		{"duration too short", "[api]", "[cache]\nttl = \"1us\"\n[api]", "is not a positive duration"},
		{"sink without a path", "[api]", "[audit.file]\n[api]", ":13: audit.file.path: missing: "},
		{"syslog address", "[api]", "[audit.syslog]\naddress = \"log.example:514\"\n[api]", ":14: audit.syslog.address: "},
		{"syslog CA", "[api]", "[audit.syslog]\naddress = \"udp://log.example:514\"\nca = \"ca.pem\"\n[api]", ":15: audit.syslog.ca: only a tls:// address"},
		{"collector", "[api]", "[audit.otlp]\nendpoint = \"collector:4318\"\n[api]", ":14: audit.otlp.endpoint: "},
		{"collector's CA", "[api]", "[audit.otlp]\nca = \"ca.pem\"\nendpoint = \"http://c:4318/v1/logs\"\n[api]", ":14: audit.otlp.ca: only an https:// endpoint"},
		{"webhook without a URL", "[api]", "[notify.desk]\nkey = \"k\"\n[api]", ":13: notify.desk.url: missing: "},
		{"webhook's URL", "[api]", "[notify.desk]\nkey = \"k\"\nurl = \"http://desk.example/\"\n[api]", ":15: notify.desk.url: "},
		{"webhook without a key", "[api]", "[notify.desk]\nurl = \"https://desk.example/\"\n[api]", ":13: notify.desk.key: missing: "},
		{"webhook's CA", "[api]", "[notify.desk]\nurl = \"http://127.0.0.1:1/\"\nkey = \"k\"\nca = \"ca.pem\"\n[api]", ":16: notify.desk.ca: only an https:// URL"},
		{"webhook's kinds", "[api]", "[notify.desk]\nurl = \"https://desk.example/\"\nkey = \"k\"\nkinds = [\"proposal\", \"rain\"]\n[api]", `:16: notify.desk.kinds: "rain" is not one of `},
		{"webhook's key in the text", "[api]", "[notify.desk]\nsecret = \"k\"\n[api]", ":14:1: notify.desk.secret: no such field"},
		{"webhook's name", "[api]", "[notify.\"a b\"]\n[api]", "notify.a b: "},
		{"anomaly's number", "[api]", "[anomaly]\ndenials = -1\n[api]", ":14: anomaly.denials: "},
		{"anomaly's hours", "[api]", "[anomaly.hours.office]\nfrom = \"7:00\"\nto = \"19:00\"\n[api]", ":14: anomaly.hours.office.from: "},
		{"anomaly's days", "[api]", "[anomaly.hours.office]\nfrom = \"07:00\"\nto = \"19:00\"\ndays = [\"monday\"]\n[api]", ":16: anomaly.hours.office.days: "},
		{"anomaly's zone", "[api]", "[anomaly.hours.office]\nfrom = \"07:00\"\nto = \"19:00\"\nzone = \"Moon/Tycho\"\n[api]", ":16: anomaly.hours.office.zone: "},
		{"anomaly's empty hours", "[api]", "[anomaly.hours.office]\nfrom = \"07:00\"\nto = \"07:00\"\n[api]", ":15: anomaly.hours.office.to: "},
		{"unknown sink", "[api]", "[audit.kafka]\n[api]", ":13:2: audit.kafka: no such field"},
		{"log level", "[api]", "[log]\nlevel = \"loud\"\n[api]", `:14: log.level: "loud" is not debug, info, warn or error`},
		{"log format", "[api]", "[log]\nformat = \"xml\"\n[api]", `:14: log.format: "xml" is not`},
	} {
		t.Run(x.name, func(t *testing.T) {
			if !strings.Contains(goodConfig, x.old) {
				t.Fatalf("the test replaces %q, which is not there", x.old)
			}
			path := writeConfigFile(t, strings.Replace(goodConfig, x.old, x.new, 1))
			_, err := loadConfig(path)
			if err == nil {
				t.Fatal("accepted")
			}
			if s := err.Error(); !strings.HasPrefix(s, path+":") || !strings.Contains(s, x.want) {
				t.Errorf("%s\ndoes not say %s", s, x.want)
			}
		})
	}
	if _, err := loadConfig("/nonexistent/conclaved.toml"); err == nil || !strings.Contains(err.Error(), "/nonexistent/conclaved.toml") {
		t.Error(err)
	}
}

func TestLineOf(t *testing.T) {
	text := []byte("# node = 1\nnode = \"\"\"\n[tls]\nkey = 1\n\"\"\"\n\n[tls] # key =\n\n  key = 'x'\n[cluster]\na.b = 1\n[api]\n[log]\n")
	for field, want := range map[string]int{
		"node": 2, "tls.key": 9, "tls.certificate": 7, "cluster.a.b": 11, "api.listen": 12, "log": 1, "none": 1, "none.x": 1, "": 1,
	} {
		if got := lineOf(text, field); got != want {
			t.Errorf("%q is in line %d, want %d", field, got, want)
		}
	}
	if got := lineOf([]byte("not TOML ["), "node"); got != 1 {
		t.Errorf("line %d of what is no TOML", got)
	}
}

// FuzzConfig holds that no configuration file panics the loader and that every
// refusal names the file.
func FuzzConfig(f *testing.F) {
	for _, s := range []string{goodConfig, "", "node = 1", "[[tls]]", "node = \"a\"\n[tls.key]", "a.b.c = [1, {x=2}]", "\x00", "cache = 1"} {
		f.Add(s)
	}
	path := filepath.Join(f.TempDir(), "conclaved.toml")
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := loadConfig(path); err != nil && !strings.HasPrefix(err.Error(), path) {
			t.Errorf("%v does not name the file", err)
		}
	})
}

// TestDeviceDefaults: a device that is not there has none, one that is has them
// whichever table it is in.
func TestDeviceDefaults(t *testing.T) {
	c, err := loadConfig(writeConfigFile(t, goodConfig))
	if err != nil || c.NextDevice != nil || c.Device.isolated() != isolateByDefault {
		t.Fatalf("%+v, %v", c.NextDevice, err)
	}
	path := writeConfigFile(t, strings.Replace(goodConfig, "uri ", "isolate = false\n#uri ", 1)+`uris = ["pkcs11:token=a", "pkcs11:token=b"]
softhsm_confs = ["a.conf", "/b.conf"]
[next_device]
type = "tpm"
path = "unix:s"
auth_file = "auth"
pcrs = [7, 0]
`)
	c, err = loadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	tokens := c.Device.pkcs11()
	if c.Device.isolated() || len(tokens) != 2 || tokens[1].URI != "pkcs11:token=b" || tokens[1].SoftHSMConf != "/b.conf" ||
		tokens[0].SoftHSMConf != filepath.Join(filepath.Dir(path), "a.conf") {
		t.Errorf("%+v", tokens)
	}
	next := c.NextDevice
	if next.Curve != "P-384" || next.CallTimeout.Duration != 10*time.Second || next.AuthFile != filepath.Join(filepath.Dir(path), "auth") || fmt.Sprint(next.PCRs) != "[7 0]" {
		t.Errorf("%+v", next)
	}
}

// TestPINDescriptor reads the PIN once, from a descriptor that is then closed.
func TestPINDescriptor(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteString("123456\n"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	fd, err := syscall.Dup(int(r.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	pin, err := readDescriptor(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Destroy()
	if string(pin.Reveal()) != "123456" {
		t.Error("the PIN is not what was written")
	}
	if _, err := readDescriptor(fd); err == nil {
		t.Error("the descriptor could be read twice")
	}
	if _, err := readDescriptor(0); err == nil {
		t.Error("standard input was taken for the PIN")
	}
}
