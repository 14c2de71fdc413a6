package audit

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"

	"github.com/transparency-dev/merkle/compact"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/tlog"
)

const (
	tilesDir = "tiles" // below the log's directory: one file a level, a tile after the other
	tileSize = tlog.TileWidth * tlog.HashSize

	// maxWaiting bounds the full tiles that are in memory only.
	maxWaiting = 4096
)

// tiles keeps the hashes of a growing tree at the levels of tiles (kms/tlog), so
// that proofs can be made for every size. They are derived from the leaves:
// opening a log computes them again and compares, so nothing is synced, and
// no failure here is one of the log.
type tiles struct {
	dir string

	mu      sync.Mutex
	levels  []*tileLevel
	waiting int   // full tiles of all levels that are in memory only
	failed  error // why there are no hashes any more

	writing sync.Mutex    // held by whoever writes files
	wake    chan struct{} // capacity 1; nil until behind
	stopped chan struct{}
}

type tileLevel struct {
	file    *os.File // nil: there is none
	old     uint64   // tiles in the file that have not been compared yet, up to this number
	done    uint64   // tiles in the file that are right
	waiting [][]byte // the full tiles after these
	tail    []byte   // the tile that grows
}

func newTiles(dir string) *tiles { return &tiles{dir: filepath.Join(dir, tilesDir)} }

// path is the file of a level.
func (t *tiles) path(level int) string { return filepath.Join(t.dir, strconv.Itoa(level)) }

// take adds the next hash of the node's level. The caller holds mu.
func (t *tiles) take(id compact.NodeID, hash []byte) {
	if id.Level%8 != 0 || t.failed != nil {
		return
	}
	n := int(id.Level / 8)
	if n == len(t.levels) {
		t.levels = append(t.levels, t.openLevel(n))
	}
	l := t.levels[n]
	l.tail = append(l.tail, hash...)
	if len(l.tail) < tileSize {
		return
	}
	if len(l.waiting) == 0 && l.done < l.old && l.holds(l.tail) {
		l.done, l.tail = l.done+1, l.tail[:0]
		return
	}
	l.old = l.done // what else is there is not compared any more, but written anew
	l.waiting, l.tail = append(l.waiting, l.tail), make([]byte, 0, tileSize)
	if t.waiting++; t.waiting > maxWaiting {
		t.fail(fmt.Errorf("%d tiles of hashes wait for %s to be written", t.waiting, t.dir))
	}
	if t.wake != nil {
		select {
		case t.wake <- struct{}{}:
		default:
		}
	}
}

// openLevel opens a file that is there. One that cannot be read is as one that is
// not there.
func (t *tiles) openLevel(level int) *tileLevel {
	l := &tileLevel{tail: make([]byte, 0, tileSize)}
	path := t.path(level)
	if checkFile(path) != nil {
		return l
	}
	f, err := os.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return l
	}
	l.file = f
	if fi, err := f.Stat(); err == nil {
		l.old = uint64(fi.Size()) / tileSize
	}
	return l
}

// holds reports whether the next tile in the file is this one.
func (l *tileLevel) holds(tile []byte) bool {
	b := make([]byte, tileSize)
	_, err := l.file.ReadAt(b, int64(l.done*tileSize))
	return err == nil && bytes.Equal(b, tile)
}

// fail gives up the hashes until the log is opened anew. The caller holds mu.
func (t *tiles) fail(err error) {
	if t.failed == nil {
		t.failed = err
	}
	t.waiting = 0
	for _, l := range t.levels {
		l.waiting, l.tail = nil, nil
	}
}

// write writes the tiles that wait.
func (t *tiles) write() {
	t.writing.Lock()
	defer t.writing.Unlock()
	for n := 0; ; n++ {
		t.mu.Lock()
		if n >= len(t.levels) {
			t.mu.Unlock()
			return
		}
		l := t.levels[n]
		b, count, at := bytes.Join(l.waiting, nil), len(l.waiting), l.done
		t.mu.Unlock()
		if count == 0 {
			continue
		}
		f, err := t.append(n, b, int64(at*tileSize))
		t.mu.Lock()
		if err != nil {
			t.fail(err)
		}
		if t.failed == nil {
			l.done, l.waiting, t.waiting = at+uint64(count), slices.Clone(l.waiting[count:]), t.waiting-count
			if l.file == nil {
				l.file = f
				f = nil
			}
		}
		t.mu.Unlock()
		if f != nil {
			f.Close()
		}
	}
}

// append writes tiles at an offset and returns the file, open for reading.
func (t *tiles) append(level int, b []byte, at int64) (*os.File, error) {
	if err := os.MkdirAll(t.dir, 0o700); err != nil {
		return nil, err
	}
	if err := checkDir(t.dir); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(t.path(level), os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		_, err = f.WriteAt(b, at)
	}
	return f, err
}

// relieve writes what has gathered while a log is opened.
func (t *tiles) relieve() {
	t.mu.Lock()
	many := t.waiting >= maxWaiting/16
	t.mu.Unlock()
	if many {
		t.write()
	}
}

// behind starts writing beside the log, which has been read; close ends it.
func (t *tiles) behind() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range t.levels {
		l.old = l.done
	}
	t.wake, t.stopped = make(chan struct{}, 1), make(chan struct{})
	go func(wake chan struct{}) {
		defer close(t.stopped)
		t.write()
		for range wake {
			t.write()
		}
	}(t.wake)
}

// close writes what waits if the tiles are written at all, and closes the files.
func (t *tiles) close() {
	t.mu.Lock()
	wake := t.wake
	t.wake = nil
	t.mu.Unlock()
	if wake != nil {
		close(wake)
		<-t.stopped
		t.write()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range t.levels {
		if l.file != nil {
			l.file.Close()
		}
	}
	t.failed = kms.Errorf(kms.Unavailable, "the log is closed")
}

// Hashes is that of tlog.Source.
func (t *tiles) Hashes(level uint, from, n uint64) ([][]byte, error) {
	b, file, err := t.inMemory(level, from, n)
	if err != nil {
		return nil, err
	}
	if inFile := int64(n)*tlog.HashSize - int64(len(b)); inFile > 0 {
		head := make([]byte, inFile, inFile+int64(len(b)))
		if _, err := file.ReadAt(head, int64(from)*tlog.HashSize); err != nil {
			return nil, kms.Wrap(kms.Unavailable, err, "the hashes of the log cannot be read", "restart the node, which computes them again")
		}
		b = append(head, b...)
	}
	h := make([][]byte, n)
	for i := range h {
		h[i] = b[i*tlog.HashSize : (i+1)*tlog.HashSize : (i+1)*tlog.HashSize]
	}
	return h, nil
}

// inMemory returns a copy of those of the hashes that are in memory, which are the
// last ones, and the file for the others.
func (t *tiles) inMemory(level uint, from, n uint64) ([]byte, *os.File, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.failed != nil {
		return nil, nil, kms.Wrap(kms.Unavailable, t.failed, "the hashes of the log are not there", "free space for them and restart the node, which computes them again")
	}
	var l tileLevel
	if level < uint(len(t.levels)) {
		l = *t.levels[level]
	}
	count := (l.done+uint64(len(l.waiting)))*tlog.TileWidth + uint64(len(l.tail))/tlog.HashSize
	if n > count || from > count-n {
		return nil, nil, kms.Errorf(kms.Invalid, "the log has %d hashes of level %d, not %d from number %d on", count, level, n, from)
	}
	var b []byte
	for at := max(from, l.done*tlog.TileWidth); at < from+n; {
		tile := l.tail
		if i := at/tlog.TileWidth - l.done; i < uint64(len(l.waiting)) {
			tile = l.waiting[i]
		}
		skip := at % tlog.TileWidth
		k := min(uint64(len(tile))/tlog.HashSize-skip, from+n-at)
		b, at = append(b, tile[skip*tlog.HashSize:(skip+k)*tlog.HashSize]...), at+k
	}
	return b, l.file, nil
}
