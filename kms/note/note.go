// Package note has the checkpoints of the cluster's logs as C2SP signed notes: their
// text, the two kinds of signature lines that nodes put under it, and how both are
// verified. It is pure.
//
// A checkpoint (https://c2sp.org/tlog-checkpoint) says how long a log is and what its
// RFC 6962 root is. Each node signs with two keys, and a signature counts only as a pair:
//
//   - its hardware signing key, over the whole text, extension lines included. C2SP has no
//     signature type for ECDSA over SHA-384 by a device that signs digests, so the type is
//     0xff with the label of this package (https://c2sp.org/signed-note);
//   - its ML-DSA-44 key, as https://c2sp.org/tlog-cosignature says (type 0x06), over the
//     names, time, size and root. Any verifier of such cosignatures takes it.
package note

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/conclave-kms/conclave/kms"
)

// Bounds of a checkpoint.
const (
	MaxName       = 255 // bytes of an origin and of a key name (tlog-cosignature)
	MaxExtensions = 16  // lines
	MaxExtension  = 512 // bytes of one
)

// Checkpoint is the head of a log.
type Checkpoint struct {
	Origin     string   // of the log, see Origin
	Size       uint64   // leaves
	Root       []byte   // RFC 6962 with SHA-256, 32 bytes
	Extensions []string // further lines
}

// Marshal returns the note's text: origin, size and root in base64, then the
// extensions, a line each. The checkpoint must be valid.
func (c Checkpoint) Marshal() []byte {
	lines := append([]string{c.Origin, strconv.FormatUint(c.Size, 10), base64.StdEncoding.EncodeToString(c.Root)}, c.Extensions...)
	return []byte(strings.Join(lines, "\n") + "\n")
}

// Validate checks lengths and characters. Errors: kms.Invalid.
func (c Checkpoint) Validate() error {
	if !validName(c.Origin) {
		return kms.Errorf(kms.Invalid, "checkpoint: the origin is not 1 to %d bytes of text without spaces", MaxName)
	}
	if len(c.Root) != sha256.Size {
		return kms.Errorf(kms.Invalid, "checkpoint: the root has %d bytes, not %d", len(c.Root), sha256.Size)
	}
	if len(c.Extensions) > MaxExtensions {
		return kms.Errorf(kms.Invalid, "checkpoint: there are %d extension lines; the limit is %d", len(c.Extensions), MaxExtensions)
	}
	for _, e := range c.Extensions {
		if e == "" || len(e) > MaxExtension || !plain(e) {
			return kms.Errorf(kms.Invalid, "checkpoint: an extension line is not 1 to %d bytes of text", MaxExtension)
		}
	}
	return nil
}

// Parse decodes exactly what Marshal writes. Errors: kms.Invalid.
func Parse(text []byte) (Checkpoint, error) {
	bad := func(what string) (Checkpoint, error) {
		return Checkpoint{}, kms.Errorf(kms.Invalid, "checkpoint: %s", what)
	}
	if len(text) > (3+MaxExtensions)*(MaxExtension+1) {
		return bad("it is too long")
	}
	body, ends := strings.CutSuffix(string(text), "\n")
	lines := strings.Split(body, "\n")
	if !ends || len(lines) < 3 {
		return bad("it has fewer than three lines")
	}
	size, err := strconv.ParseUint(lines[1], 10, 64)
	if err != nil {
		return bad("the size is no number")
	}
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil {
		return bad("the root is not base64")
	}
	c := Checkpoint{Origin: lines[0], Size: size, Root: root, Extensions: lines[3:]}
	if err := c.Validate(); err != nil {
		return Checkpoint{}, err
	}
	if !bytes.Equal(c.Marshal(), text) {
		return bad("it is not in canonical form")
	}
	return c, nil
}

// validName is what signed-note asks of a key name, and we of an origin.
func validName(s string) bool {
	return s != "" && len(s) <= MaxName && plain(s) && !strings.Contains(s, "+") && len(strings.Fields(s)) == 1 && strings.TrimSpace(s) == s
}

// plain reports whether s is UTF-8 without control characters.
func plain(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return r < 0x20 }) < 0
}

// ClusterLog names the cluster log among the logs of a cluster, AccessLog the access
// log of a node.
const ClusterLog = "cluster"

// AccessLog names the access log of a node, see ClusterLog.
func AccessLog(node string) string { return "access/" + node }

// Origin is the origin line of a log: "conclave/", the lineage of the cluster's history
// (state.State.Lineage), and the name of the log.
func Origin(lineage, log string) string { return "conclave/" + lineage + "/" + log }

// KeyName is the name of a node's keys in signature lines.
func KeyName(cluster, node string) string { return "conclave/" + cluster + "/node/" + node }

// StateExtension is the extension line of a checkpoint of the cluster log that says
// what the hash of the state is which the log's commands lead to (state.State.Hash).
func StateExtension(hash []byte) string {
	return "state " + base64.StdEncoding.EncodeToString(hash)
}
