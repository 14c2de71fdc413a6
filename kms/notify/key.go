package notify

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"strconv"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

// Lengths of a webhook's key in bytes, of Standard Webhooks.
const (
	minKey = 24
	maxKey = 64
)

// maxKeys is how many keys a webhook may have: the one in force, and those before or
// after it.
const maxKeys = 4

var keyPrefix = []byte("whsec_")

// ParseKeys reads a webhook's keys, a line each: whsec_ and base64 of 24 to 64 random bytes.
// With several each signs, so that a receiver can change over. Errors say nothing of what
// was read.
func ParseKeys(text []byte) (keys []*secret.Bytes, err error) {
	defer func() {
		if err != nil {
			destroy(keys)
			keys = nil
		}
	}()
	for line := range bytes.Lines(text) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			continue
		}
		if len(keys) == maxKeys {
			return keys, kms.Errorf(kms.Invalid, "there are more than %d keys", maxKeys)
		}
		k, err := parseKey(line)
		if err != nil {
			return keys, err
		}
		keys = append(keys, k)
	}
	if len(keys) == 0 {
		return keys, kms.Errorf(kms.Invalid, "there is no key")
	}
	return keys, nil
}

func parseKey(line []byte) (*secret.Bytes, error) {
	encoded, ok := bytes.CutPrefix(line, keyPrefix)
	b := make([]byte, base64.StdEncoding.DecodedLen(len(encoded)))
	n, err := base64.StdEncoding.Decode(b, encoded)
	if !ok || err != nil || n < minKey || n > maxKey {
		secret.Wipe(b)
		return nil, kms.Errorf(kms.Invalid, "a key is not whsec_ and base64 of %d to %d bytes", minKey, maxKey)
	}
	return secret.Move(b[:n])
}

func destroy(keys []*secret.Bytes) {
	for _, k := range keys {
		k.Destroy()
	}
}

// signature is the value of the header webhook-signature: for each key v1, and the HMAC-SHA256
// of the message's id, its time and its body, separated by dots
// (https://github.com/standard-webhooks/standard-webhooks, "Signature scheme").
func signature(keys []*secret.Bytes, id string, at time.Time, body []byte) string {
	var out []byte
	for i, k := range keys {
		m := hmac.New(sha256.New, k.Reveal())
		m.Write([]byte(id + "." + strconv.FormatInt(at.Unix(), 10) + "."))
		m.Write(body)
		if i > 0 {
			out = append(out, ' ')
		}
		out = base64.StdEncoding.AppendEncode(append(out, "v1,"...), m.Sum(nil))
	}
	return string(out)
}
