package cluster

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
)

// pages is a bbolt file read for its structure alone: that every page which can be
// reached is where it should be, and that what it lists lies within it and is in order.
// bbolt takes that for granted: it panics where it does not hold, partly in goroutines of
// its own or while they go on reading, or runs through memory. The layout is that of bbolt's file format 2, in the machine's byte order.
type pages struct {
	file io.ReaderAt
	size uint64 // of a page in bytes
	end  uint64 // pages in use
	seen map[uint64]bool
}

const (
	pageHeader  = 16
	metaSize    = 64
	boltMagic   = 0xED0CDAED
	boltVersion = 2

	pageBranch   = 1
	pageLeaf     = 2
	elementSize  = 16 // of branch and leaf pages alike
	elementInner = 1  // flag of a leaf element: its value is a bucket
)

var order = binary.NativeEndian

// checkPages walks through the file from its root.
func checkPages(file io.ReaderAt) error {
	p := &pages{file: file, seen: map[uint64]bool{}}
	root, err := p.meta()
	if err != nil {
		return err
	}
	return p.page(root, span{})
}

// span is where keys may lie: not before low, and before high; nil is no bound.
type span struct{ low, high []byte }

func (s span) has(key []byte) bool {
	return bytes.Compare(key, s.low) >= 0 && (s.high == nil || bytes.Compare(key, s.high) < 0)
}

// meta reads the two pages that describe the file and returns the root. bbolt is content
// with one: with that of the transaction before the last, it would forget the last.
func (p *pages) meta() (root uint64, err error) {
	var latest uint64
	for i := range uint64(2) {
		b := make([]byte, pageHeader+metaSize)
		if i == 1 && p.size == 0 {
			return 0, errors.New("the first page is damaged")
		}
		if _, err := p.file.ReadAt(b, int64(i*p.size)); err != nil {
			return 0, fmt.Errorf("it ends before page %d: %w", i, err)
		}
		m := b[pageHeader:]
		sum := fnv.New64a()
		sum.Write(m[:metaSize-8])
		if order.Uint32(m) != boltMagic || order.Uint32(m[4:]) != boltVersion || order.Uint64(m[metaSize-8:]) != sum.Sum64() {
			return 0, fmt.Errorf("page %d, which describes the file, is damaged", i)
		}
		p.size = uint64(order.Uint32(m[8:]))
		if txid := order.Uint64(m[48:]); txid >= latest {
			latest, root, p.end = txid, order.Uint64(m[16:]), order.Uint64(m[40:])
		}
	}
	return root, nil
}

// page checks a page and all below it, whose keys lie in a span.
func (p *pages) page(id uint64, in span) error {
	bad := func(what string) error { return fmt.Errorf("page %d is damaged: %s", id, what) }
	if id < 2 || id >= p.end {
		return bad("there is none of that number")
	}
	head := make([]byte, pageHeader)
	if _, err := p.file.ReadAt(head, int64(id*p.size)); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	flags, count, overflow := order.Uint16(head[8:]), uint64(order.Uint16(head[10:])), uint64(order.Uint32(head[12:]))
	if order.Uint64(head) != id || flags != pageBranch && flags != pageLeaf || id+overflow >= p.end {
		return bad("its header is that of another")
	}
	for i := id; i <= id+overflow; i++ {
		if p.seen[i] {
			return bad("it is in use twice")
		}
		p.seen[i] = true
	}
	b := make([]byte, (1+overflow)*p.size)
	if _, err := p.file.ReadAt(b, int64(id*p.size)); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	if pageHeader+count*elementSize > uint64(len(b)) || flags == pageBranch && count == 0 {
		return bad("it lists more than it can hold")
	}
	if flags == pageBranch {
		return p.branch(b, count, in, bad)
	}
	return p.leaf(b, count, in, bad)
}

// branch checks what a page lists of other pages.
func (p *pages) branch(b []byte, count uint64, in span, bad func(string) error) error {
	keys, below := make([][]byte, count), make([]uint64, count)
	for i := range count {
		at := pageHeader + i*elementSize
		pos, ksize := uint64(order.Uint32(b[at:])), uint64(order.Uint32(b[at+4:]))
		if at+pos+ksize > uint64(len(b)) {
			return bad("a key lies beyond its end")
		}
		keys[i], below[i] = b[at+pos:at+pos+ksize], order.Uint64(b[at+8:])
		if !in.has(keys[i]) || i > 0 && bytes.Compare(keys[i-1], keys[i]) >= 0 {
			return bad("its keys are out of order")
		}
	}
	for i, id := range below {
		s := span{keys[i], in.high}
		if i+1 < len(keys) {
			s.high = keys[i+1]
		}
		if err := p.page(id, s); err != nil {
			return err
		}
	}
	return nil
}

// leaf checks what a page, or a bucket inside a value, lists.
func (p *pages) leaf(b []byte, count uint64, in span, bad func(string) error) error {
	var last []byte
	for i := range count {
		at := pageHeader + i*elementSize
		e := b[at:]
		inner, pos, ksize, vsize := order.Uint32(e), uint64(order.Uint32(e[4:])), uint64(order.Uint32(e[8:])), uint64(order.Uint32(e[12:]))
		if inner > elementInner || pos < (count-i)*elementSize || ksize == 0 || at+pos+ksize+vsize > uint64(len(b)) {
			return bad("an entry lies beyond its end")
		}
		key := b[at+pos : at+pos+ksize]
		if !in.has(key) || last != nil && bytes.Compare(last, key) >= 0 {
			return bad("its keys are out of order")
		}
		last = key
		if inner == 0 {
			continue
		}
		if err := p.bucket(b[at+pos+ksize:at+pos+ksize+vsize], bad); err != nil {
			return err
		}
	}
	return nil
}

// bucket checks a bucket: its root page, or a small one within the value itself.
func (p *pages) bucket(v []byte, bad func(string) error) error {
	if len(v) < 16 {
		return bad("a part of the file is cut short")
	}
	if root := order.Uint64(v); root != 0 {
		return p.page(root, span{})
	}
	v = v[16:]
	if len(v) < pageHeader || order.Uint16(v[8:]) != pageLeaf {
		return bad("a part of the file is damaged")
	}
	count := uint64(order.Uint16(v[10:]))
	if pageHeader+count*elementSize > uint64(len(v)) {
		return bad("a part of the file lists more than it can hold")
	}
	return p.leaf(v, count, span{}, bad)
}
