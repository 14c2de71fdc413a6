package kms

import (
	"encoding/binary"
	"strings"
)

// ReceiptPrefix begins every ReceiptMessage. Nothing else that begins with it is
// ever signed with a key of the service.
const ReceiptPrefix = "conclave/receipt/1\x00"

// ReceiptMessage is what a node signs with a new version of a sign key of
// protection Hardware to prove that its device can use it: ReceiptPrefix, then
// cluster, keyring, key id, version (4 bytes) and node, each but the version
// preceded by its length; numbers are 32 bits, big endian. It is hashed as any
// message that the key signs.
func ReceiptMessage(cluster, keyring string, id KeyID, version uint32, node string) []byte {
	b := []byte(ReceiptPrefix)
	for _, s := range []string{cluster, keyring, string(id[:])} {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
	}
	b = binary.BigEndian.AppendUint32(b, version)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(node))), node...)
}

// ReservedMessage reports whether a message is one that only receipts may be
// signed over.
func ReservedMessage(message []byte) bool { return strings.HasPrefix(string(message), ReceiptPrefix) }
